"""Which schema a session works in: the one that holds nexhb's tables, whatever the role's search_path says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr

from nexhb import config, devices, migrate
from nexhb.db import Connection, Database
from nexhb.errors import DatabaseUnfit
from nexhb.session import Home, Schemas, choose_schema
from tests.conftest import SOON_S, Agent, Nexhb, StartDaemon


@pytest.fixture
async def role(conn: Connection) -> AsyncIterator[str]:
    """The role of every session; its defaults are taken back at the end."""
    name = await conn.fetchval("SELECT current_user")
    yield f'"{name}"'
    await conn.execute(f'ALTER ROLE "{name}" RESET ALL')


async def known(database: Database) -> str:
    """The token of a device."""
    async with database.connected(application="test") as conn:
        return await devices.add(conn, "kiosk-1", None)


async def test_a_schema_of_the_roles_name_hides_no_device(
    start_daemon: StartDaemon, database: Database, conn: Connection, now: datetime
) -> None:
    """CREATE SCHEMA AUTHORIZATION nexhb put an empty schema first in the default search_path: the next start made a
    second set of tables in it, was ready, and answered every good token 401."""
    token = await known(database)
    await conn.execute("CREATE SCHEMA AUTHORIZATION CURRENT_USER")
    nexhb = await start_daemon()
    assert (await Agent(nexhb, "kiosk-1", token).send(now)).status == 200
    assert await conn.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'device_tokens'") == 1


async def test_a_search_path_set_while_the_daemon_runs_moves_nobody(
    nexhb: Nexhb, conn: Connection, role: str, now: datetime
) -> None:
    agent = await nexhb.agent()
    await conn.execute("CREATE SCHEMA elsewhere")
    await conn.execute("CREATE TABLE elsewhere.devices (n int)")
    await conn.execute("CREATE TABLE elsewhere.device_tokens AS SELECT * FROM device_tokens WITH NO DATA")
    await conn.execute(f"ALTER ROLE {role} SET search_path = elsewhere")
    await conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'nexhb%'")
    other = Agent(nexhb, "x", "x" * 43)
    async with asyncio.timeout(SOON_S):
        while (answer := await agent.send(now)).status != 200:
            assert answer.status == 503, answer
            await asyncio.sleep(0.05)
    assert (await other.send(now)).status == 401  # the store was really read
    assert len(await nexhb.rows("SELECT * FROM public.device_heartbeats")) == 1
    assert (await nexhb.get("/v1/fleet"))["devices"] == 1


async def test_tables_in_two_schemas_are_refused_until_one_is_named(
    start_daemon: StartDaemon, database: Database, conn: Connection, now: datetime
) -> None:
    token = await known(database)
    await conn.execute("CREATE SCHEMA other; SET search_path = other")
    await migrate.migrate(conn, datetime.now(UTC))
    with pytest.raises(DatabaseUnfit, match=r'"other" and "public"\. .*database\.schema_name'):
        await start_daemon(url=database.dsn)
    named = config.Database(url=SecretStr(database.dsn), schema_name="public")
    nexhb = await start_daemon(database=named)
    assert (await Agent(nexhb, "kiosk-1", token).send(now)).status == 200


async def test_a_copy_that_somebody_makes_beside_a_running_daemon_moves_it_nowhere(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent()
    await conn.execute("CREATE SCHEMA copy; SET search_path = copy")
    await migrate.migrate(conn, datetime.now(UTC))
    await conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'nexhb%'")
    async with asyncio.timeout(SOON_S):
        while (answer := await agent.send(now)).status != 200:
            assert answer.status == 503, answer
            await asyncio.sleep(0.05)


async def test_an_empty_database_gets_its_tables_in_the_schema_that_is_named(
    start_daemon: StartDaemon, empty_database: Database
) -> None:
    async with empty_database.connected(application="test") as conn:
        named = config.Database(url=SecretStr(empty_database.dsn), schema_name='the "house"')
        with pytest.raises(DatabaseUnfit, match="CREATE SCHEMA"):
            await start_daemon(database=named)
        await conn.execute('CREATE SCHEMA "the ""house"""')
        await start_daemon(database=named)
        found = await conn.fetch("SELECT DISTINCT schemaname FROM pg_stat_user_tables")
        assert [row["schemaname"] for row in found] == ['the "house"']


ALL = ("a", "b", "public")


@pytest.mark.parametrize(
    ("home", "there", "schema"),
    [
        (Home(), Schemas((), (), "public", ALL), "public"),  # a fresh database
        (Home(), Schemas((), (), "a", ALL), "a"),
        (Home(), Schemas(("public",), (), "a", ALL), "public"),  # tables elsewhere
        (Home(), Schemas(("public",), ("a",), "a", ALL), "public"),  # one table copied
        (Home(), Schemas((), ("public",), "a", ALL), "public"),  # one that was lost
        (Home(found="b"), Schemas(("a", "b"), (), "a", ALL), "b"),
        (Home(found="b"), Schemas(("a",), (), "a", ALL), "a"),
        (Home("b"), Schemas(("a", "b"), (), "a", ALL), "b"),
        (Home("b"), Schemas((), (), "a", ALL), "b"),
    ],
)
def test_the_schema_is_the_one_with_the_tables(home: Home, there: Schemas, schema: str) -> None:
    assert choose_schema(home, there) == schema


@pytest.mark.parametrize(
    ("home", "there", "said"),
    [
        (Home(), Schemas(("a", "b"), (), "a", ALL), "schemas \"a\" and \"b\""),
        (Home(), Schemas((), ("a", "b"), "a", ALL), "schemas \"a\" and \"b\""),
        (Home(), Schemas((), (), None, ALL), "CREATE SCHEMA"),
        (Home("b"), Schemas(("a",), (), "a", ALL), "the tables of nexhb are in \"a\""),
        (Home("c"), Schemas((), (), "a", ALL), "may not use the schema \"c\""),
        (Home(), Schemas(("secret",), (), "a", ALL), "may not use the schema \"secret\""),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused(home: Home, there: Schemas, said: str) -> None:
    with pytest.raises(DatabaseUnfit, match=said):
        choose_schema(home, there)
