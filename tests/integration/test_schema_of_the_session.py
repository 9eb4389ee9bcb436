"""A session uses the schema that has nexhb's tables, whatever the role's search_path is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr

from nexhb import config
from nexhb.devices import registry
from nexhb.errors import DatabaseUnfit
from nexhb.postgres import migrate
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.session import Schemas, TableSchema, choose_schema
from tests.conftest import Agent, Nexhb, StartDaemon


@pytest.fixture
async def role(conn: Connection) -> AsyncIterator[str]:
    """Yield the role of every session, and reset its defaults at the end."""
    name = await conn.fetchval("SELECT current_user")
    yield f'"{name}"'
    await conn.execute(f'ALTER ROLE "{name}" RESET ALL')


async def known(database: Database) -> str:
    """Add a device, and return its token."""
    async with database.connected(application="test") as conn:
        return await registry.add(conn, "kiosk-1", None)


async def test_a_schema_with_the_roles_name_does_not_hide_devices(
    start_daemon: StartDaemon, database: Database, conn: Connection, now: datetime
) -> None:
    """CREATE SCHEMA AUTHORIZATION nexhb puts an empty schema first in the default search_path. Formerly, the next start
    created a second set of tables there, became ready, and returned 401 for every valid token."""
    token = await known(database)
    await conn.execute("CREATE SCHEMA AUTHORIZATION CURRENT_USER")
    nexhb = await start_daemon()
    assert (await Agent(nexhb, "kiosk-1", token).send(now)).status == 200
    assert await conn.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'device_tokens'") == 1


async def test_a_search_path_set_while_the_daemon_runs_changes_nothing(
    nexhb: Nexhb, conn: Connection, role: str, now: datetime
) -> None:
    agent = await nexhb.agent()
    await conn.execute("CREATE SCHEMA elsewhere")
    await conn.execute("CREATE TABLE elsewhere.devices (n int)")
    await conn.execute("CREATE TABLE elsewhere.device_tokens AS SELECT * FROM device_tokens WITH NO DATA")
    await conn.execute(f"ALTER ROLE {role} SET search_path = elsewhere")
    await conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'nexhb%'")
    other = Agent(nexhb, "x", "x" * 43)
    assert (await agent.retry(now)).status == 200
    assert (await other.retry(now)).status == 401  # the token store was read
    assert len(await nexhb.rows("SELECT * FROM public.device_heartbeats")) == 1
    assert (await nexhb.get("/v1/fleet"))["devices"] == 1


async def test_tables_in_two_schemas_are_rejected_until_one_is_named(
    start_daemon: StartDaemon, database: Database, conn: Connection, now: datetime
) -> None:
    token = await known(database)
    await conn.execute("CREATE SCHEMA other; SET search_path = other")
    await migrate.migrate(conn, datetime.now(UTC))
    with pytest.raises(DatabaseUnfit, match=r'"other" and "public"\. .*database\.schema_name'):
        await start_daemon(url=database.dsn)
    named = config.DatabaseSettings(url=SecretStr(database.dsn), schema_name="public")
    nexhb = await start_daemon(database=named)
    assert (await Agent(nexhb, "kiosk-1", token).send(now)).status == 200


async def test_a_copy_of_the_tables_does_not_affect_a_running_daemon(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent()
    await conn.execute("CREATE SCHEMA copy; SET search_path = copy")
    await migrate.migrate(conn, datetime.now(UTC))
    await conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'nexhb%'")
    assert (await agent.retry(now)).status == 200


async def test_an_empty_database_gets_its_tables_in_the_schema_that_is_named(
    start_daemon: StartDaemon, empty_database: Database
) -> None:
    async with empty_database.connected(application="test") as conn:
        named = config.DatabaseSettings(url=SecretStr(empty_database.dsn), schema_name='the "house"')
        with pytest.raises(DatabaseUnfit, match="CREATE SCHEMA"):
            await start_daemon(database=named)
        await conn.execute('CREATE SCHEMA "the ""house"""')
        await start_daemon(database=named)
        found = await conn.fetch("SELECT DISTINCT schemaname FROM pg_stat_user_tables")
        assert [row["schemaname"] for row in found] == ['the "house"']


ALL = ("a", "b", "public")


@pytest.mark.parametrize(
    ("of", "schemas", "schema"),
    [
        (TableSchema(), Schemas((), (), "public", ALL), "public"),  # a fresh database
        (TableSchema(), Schemas((), (), "a", ALL), "a"),
        (TableSchema(), Schemas(("public",), (), "a", ALL), "public"),  # the tables are in another schema
        (TableSchema(), Schemas(("public",), ("a",), "a", ALL), "public"),  # one table was copied
        (TableSchema(), Schemas((), ("public",), "a", ALL), "public"),  # one table was lost
        (TableSchema(chosen="b"), Schemas(("a", "b"), (), "a", ALL), "b"),
        (TableSchema(chosen="b"), Schemas(("a",), (), "a", ALL), "a"),
        (TableSchema("b"), Schemas(("a", "b"), (), "a", ALL), "b"),
        (TableSchema("b"), Schemas((), (), "a", ALL), "b"),
    ],
)
def test_the_schema_is_the_one_with_the_tables(of: TableSchema, schemas: Schemas, schema: str) -> None:
    assert choose_schema(of, schemas) == schema


@pytest.mark.parametrize(
    ("of", "schemas", "message"),
    [
        (TableSchema(), Schemas(("a", "b"), (), "a", ALL), "schemas \"a\" and \"b\""),
        (TableSchema(), Schemas((), ("a", "b"), "a", ALL), "schemas \"a\" and \"b\""),
        (TableSchema(), Schemas((), (), None, ALL), "CREATE SCHEMA"),
        (TableSchema("b"), Schemas(("a",), (), "a", ALL), "the tables of nexhb are in \"a\""),
        (TableSchema("c"), Schemas((), (), "a", ALL), "may not use the schema \"c\""),
        (TableSchema(), Schemas(("secret",), (), "a", ALL), "may not use the schema \"secret\""),
    ],
)  # fmt: skip
def test_an_ambiguous_or_unusable_schema_is_rejected(of: TableSchema, schemas: Schemas, message: str) -> None:
    with pytest.raises(DatabaseUnfit, match=message):
        choose_schema(of, schemas)
