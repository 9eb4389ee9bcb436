"""Every session that nexhb opens has the settings that nexhb sets, whatever the defaults of role and database are."""

from __future__ import annotations

import ast
import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

import nexhb as package
from bench.nexmdm import MONOLITHIC
from nexhb import availability, cli, config, preparation
from nexhb.clock import DatabaseClock
from nexhb.devices import enrolment, registry, tokens, troubles
from nexhb.errors import DatabaseUnfit
from nexhb.partitions import midnight
from nexhb.postgres import session
from nexhb.postgres.connections import Connection, Database
from tests.conftest import ADMIN_KEY, SOON_S, Agent, StartDaemon, dsn_of
from tests.support.nexmdm_rows import add_beat, add_device
from tests.support.nightly import House
from tests.support.receiver import Receiver

SOURCES = Path(package.__file__).parent
# For each setting in LIST, a harmful value. The limits in ms end every statement of a session without its own limit.
HOSTILE = {
    "synchronous_commit": "off", "client_min_messages": "error", "statement_timeout": "5ms", "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "5ms", "idle_session_timeout": "5ms", "transaction_timeout": "9s",
    "default_transaction_isolation": "serializable", "default_transaction_deferrable": "on",
    "default_transaction_read_only": "on", "row_security": "on", "exit_on_error": "on", "timezone": "Asia/Kolkata",
    "datestyle": "SQL, DMY", "intervalstyle": "iso_8601", "bytea_output": "escape", "extra_float_digits": "-15",
    "standard_conforming_strings": "off", "array_nulls": "off", "transform_null_equals": "on",
    "quote_all_identifiers": "on", "default_tablespace": "elsewhere", "restrict_nonsystem_relation_kind": "view",
    "session_replication_role": "replica", "search_path": "elsewhere", "client_encoding": "latin1",
}  # fmt: skip
# Settings of LIST without a harmful value: only nexhb uses the first, and the second has no other value here.
NOT_TO_BE_SPOILT = {"nexhb.session", "default_table_access_method"}
# For each of these sessions, the settings whose values differ from those in LIST.
OWN = {
    "nexhb writer": {"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"},
    "nexhb reads": {"statement_timeout"},
    "nexhb legacy reads": {"statement_timeout"},
    "nexhb perf_diff": {"statement_timeout"},
    "nexhb import-legacy": {"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"},
    "nexhb look-up": {"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"},
}
LIST = session.AT_START | session.AFTER_START
SOURCE = " (source)"  # another system's database
DAY = timedelta(days=1)
Seen = dict[str, list[dict[str, str]]]


async def spoil(conn: Connection, names: list[str]) -> None:
    """Set defaults of the role and these databases that contradict everything nexhb depends on."""
    await conn.execute("SET allow_in_place_tablespaces = on")
    await conn.execute("CREATE TABLESPACE elsewhere LOCATION ''")
    role = await conn.fetchval("SELECT current_user")
    for whose in [f'ROLE "{role}"', *(f'DATABASE "{name}"' for name in names)]:
        for setting, value in HOSTILE.items():
            await conn.execute(f"ALTER {whose} SET {setting} = '{value}'")


def name_of(database: Database) -> str:
    """Return the name of a database."""
    return urlsplit(database.dsn).path.removeprefix("/")


@pytest.fixture
def enrolled_there() -> str:
    """Return the token of a device in NexMDM."""
    return tokens.new_token()


@pytest.fixture
async def hostile(
    database: Database, empty_database: Database, conn: Connection, enrolled_there: str
) -> AsyncIterator[None]:
    """Yield two databases with hostile defaults, and with a role that has hostile defaults."""
    source = await empty_database.connect(application="test source")
    now = datetime.now(UTC)
    await MONOLITHIC.create(source, now - timedelta(days=3), now)
    await add_device(source, "old-1", enrolled_there)
    await add_beat(source, "old-1", now - timedelta(hours=1))
    await spoil(conn, [name_of(database), name_of(empty_database)])
    await source.close()
    yield
    role = await conn.fetchval("SELECT current_user")
    await conn.execute(f'ALTER ROLE "{role}" RESET ALL')
    for one in (database, empty_database):
        await conn.execute(f'ALTER DATABASE "{name_of(one)}" RESET ALL')
    await conn.execute("DROP TABLESPACE elsewhere")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Record the settings of each session, by its name, once it is configured."""
    found: Seen = {}
    configure = session.configure
    names = [*LIST, "search_path", "client_encoding", "default_transaction_read_only"]

    async def configure_and_read(conn: Connection, schema: session.TableSchema) -> None:
        await configure(conn, schema)
        rows = await conn.fetch(
            "SELECT n AS name, current_setting(n) AS value FROM unnest($1::text[]) n", [*names, "application_name"]
        )
        values = {row["name"]: row["value"] for row in rows}
        application = values.pop("application_name")
        found.setdefault(application + ("" if schema.is_nexhb else SOURCE), []).append(values)

    monkeypatch.setattr(session, "configure", configure_and_read)
    return found


def kinds() -> set[str]:
    """Return every session name in nexhb's code."""
    texts = {path: path.read_text() for path in SOURCES.rglob("*.py")}
    found = {name for text in texts.values() for name in re.findall(r'"?application"?[=:] ?"(nexhb [^"]+)"', text)}
    assert 'application=f"nexhb {job.name}"' in texts[SOURCES / "jobs" / "runner.py"]
    by_job = {f"nexhb {name}" for name in ("nightly", "reconcile", "backfill", "import")}
    of_the_source = {"nexhb import-legacy", "nexhb look-up"}
    return (found - of_the_source) | by_job | {f"{name}{SOURCE}" for name in of_the_source}


def run(environment: dict[str, str], *words: str) -> str:
    """Run a command as an operator does, in this process."""
    cli.register()
    done = CliRunner().invoke(cli.app, words, env=environment)
    assert done.exit_code == 0, (words, done.output, done.exception)
    return done.output


@pytest.mark.usefixtures("hostile", "machine_time")  # the commands use the machine's clock
async def test_every_session_has_its_own_settings_and_works(
    start_daemon: StartDaemon, database: Database, empty_database: Database, conn: Connection, tmp_path: Path,
    seen: Seen, monkeypatch: pytest.MonkeyPatch, enrolled_there: str,
) -> None:  # fmt: skip
    """Formerly, a timeout or default_transaction_read_only on the role or the database ended nightly runs, restores and
    the listener; session_replication_role = replica let revoked devices in. Now every session sets what it depends
    on."""
    monkeypatch.setattr(preparation, "SETTINGS_S", 0.05)
    monkeypatch.setattr(troubles, "FLUSH_S", 0.05)
    old = (datetime.now(UTC) - timedelta(days=92)).date()
    await House(database, conn, tmp_path).fill(old)
    nexhb = await start_daemon(
        auth=config.AuthSettings(admin_key=SecretStr(ADMIN_KEY), enrolment="open"),
        reads=config.ReadsSettings(perf_diff=True, perf_diff_percent=100),
        jobs=config.JobsSettings(jitter_seconds=0),
        legacy=config.LegacySettings(source=SecretStr(empty_database.dsn)),
        notify=config.NotifySettings(routes=[Receiver("http://127.0.0.1:9").route()]),
    )
    now = datetime.now(UTC)
    agent = await nexhb.agent()  # the listener is notified of the device
    assert (await agent.send(now)).status == 200
    assert (await agent.send(now + timedelta(seconds=20))).status == 200
    assert (await agent.post(b"{}")).status == 422  # recorded as a refusal
    assert (await Agent(nexhb, "x", "x" * 43).send(now)).status == 401
    assert (await Agent(nexhb, "old-1", enrolled_there).send(now)).status == 200
    async with database.connected(application="test") as one:
        key = await enrolment.issue_enrolment_key(one, note=None, uses=1, expires_at=now + timedelta(hours=1))
        await registry.revoke(one, agent.device_id, now)
    async with asyncio.timeout(SOON_S):
        while (await agent.send(now + timedelta(seconds=40))).status != 410:
            await asyncio.sleep(0.02)
    registered = await nexhb.http.post(
        f"{nexhb.url}/v1/register", json={"device_id": "new"}, headers={"Authorization": f"Bearer {key}"}
    )
    assert registered.status in (200, 201), await registered.text()
    assert (await nexhb.get("/v1/fleet"))["devices"] >= 1
    assert (await nexhb.get("/v1/devices/offline"))["source"] == "last_status"
    async with nexhb.http.get(f"{nexhb.url}/v1/stream", headers={"x-admin": ADMIN_KEY}), asyncio.timeout(SOON_S):
        while "nexhb events" not in seen:
            await asyncio.sleep(0.02)
    async with nexhb.http.put(
        f"{nexhb.url}/ops/flags", json={"read_from_last_status": False}, headers={"x-admin": ADMIN_KEY}
    ) as changed:
        assert changed.status == 200
    assert (await nexhb.get("/v1/devices/offline"))["source"] == "legacy"
    async with asyncio.timeout(60):  # the daemon's own schedule starts both
        while not {("nightly", "completed"), ("reconcile", "completed")} <= {
            (row["job"], row["status"]) for row in await conn.fetch("SELECT job, status FROM job_runs")
        }:
            await asyncio.sleep(0.1)
    await nexhb.get("/ops/jobs")
    # A daemon whose clock the test sets does not renew this record itself.
    keeper = availability.AvailabilityKeeper(database, DatabaseClock(), lambda: True, lambda: None)
    await keeper._renew()
    await keeper._conn.close()
    environment = {
        "NEXHB_DATA_DIR": str(tmp_path), "DATABASE_URL": database.dsn, "LEGACY_DATABASE_URL": empty_database.dsn,
    }  # fmt: skip
    for words in (
        ["archive", "restore", f"{old}"], ["archive", "verify", "--all"], ["backfill", "--days", "7"],
        ["import-legacy", "--days", "2"], ["reconcile"], ["audit", "--day", f"{now.date()}"], ["partitions"],
        ["devices", "list"], ["flags"], ["perf-diff", "report"], ["migrate"], ["database"],
    ):  # fmt: skip
        await asyncio.to_thread(run, environment, *words)
    await asyncio.to_thread(CliRunner().invoke, cli.app, ["doctor"], env=environment)  # some checks of doctor fail here
    assert await conn.fetchval("SELECT count(*) FROM device_heartbeats WHERE ts < $1", midnight(old) + DAY) == 150
    until = time.monotonic() + 20
    while (missing := kinds() - seen.keys()) and time.monotonic() < until:  # tasks that run periodically
        await asyncio.sleep(0.05)
    assert missing == set()
    for name, sessions in seen.items():
        for values in sessions:
            own = OWN.get(name.removesuffix(SOURCE), {"lock_timeout"})
            if name.endswith(SOURCE):
                own = own | {"timezone"}  # the source's times are read in the zone in which they were written
            wrong = {one: values[one] for one in LIST.keys() - own if values[one].lower() != LIST[one].lower()}
            assert wrong == {}, name
            assert values["search_path"] == '"public"'
            assert values["client_encoding"] == "UTF8"
            assert values["default_transaction_read_only"] == ("on" if name.endswith(SOURCE) else "off")


def test_the_tests_hostile_role_changes_every_setting_of_the_list() -> None:
    assert {name.lower() for name in LIST} - NOT_TO_BE_SPOILT <= HOSTILE.keys()
    assert [name for name, value in HOSTILE.items() if LIST.get(name) == value] == []


def test_no_module_opens_a_session_in_another_way() -> None:
    """A connection opened in another way has the role's settings."""
    found = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("connect", "create_pool")
        and isinstance(node.value, ast.Name) and node.value.id == "asyncpg"
    }  # fmt: skip
    assert found == {
        "postgres/connections.py",
        "postgres/cluster.py",
    }


async def test_triggers_that_a_role_may_not_turn_on_are_reported(database: Database, conn: Connection) -> None:
    """Only a superuser may set session_replication_role; as replica, revoked tokens cause no notification."""
    name = await conn.fetchval("SELECT current_database()")
    me = await conn.fetchval("SELECT current_user")
    await conn.execute(f'DROP ROLE IF EXISTS plain; CREATE ROLE plain; GRANT plain TO "{me}"')
    await conn.execute(f"ALTER DATABASE {name} SET session_replication_role = replica")
    await conn.execute(f"ALTER DATABASE {name} SET role = plain")
    try:
        with pytest.raises(DatabaseUnfit, match="ALTER ROLE … RESET session_replication_role"):
            await database.connect(application="test")
    finally:
        await conn.execute(f"ALTER DATABASE {name} RESET ALL; DROP ROLE plain")


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
async def test_a_database_that_cannot_store_every_text_is_rejected_at_the_start(
    start_daemon: StartDaemon, cluster: str, conn: Connection, encoding: str
) -> None:
    """Formerly, in LATIN1, a network named "Магазин 7" caused 422, and the agent dropped the heartbeat."""
    name = f"test_{encoding.lower()}"
    await conn.execute(
        f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C'"
    )
    dsn = dsn_of(cluster, name)
    try:
        with pytest.raises(DatabaseUnfit, match=f"Its encoding is {encoding}.*ENCODING 'UTF8'"):
            await asyncio.wait_for(start_daemon(url=dsn), SOON_S / 2)  # fails at once, without a minute of retries
        bare = await asyncpg.connect(dsn)
        assert await bare.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'schema_migrations'") == 0
        await bare.close()
    finally:
        await conn.execute(f"DROP DATABASE {name} WITH (FORCE)")
