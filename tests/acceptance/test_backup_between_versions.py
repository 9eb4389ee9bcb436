"""Dumps of one version of PostgreSQL can be restored into another with the runbook's commands, in both directions."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from nexhb import partitions
from nexhb.devices import registry
from nexhb.postgres import connections, migrate, session
from nexhb.postgres.connections import Connection, Database
from tests import postgres_servers
from tests.support.runbook import blocks

RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"
NOW = datetime(2026, 11, 24, 2, tzinfo=UTC)
FINGERPRINTS = (
    "SELECT string_agg(h::text, '|' ORDER BY device_id, ts) FROM heartbeat_history h",
    "SELECT string_agg(d::text, '|' ORDER BY device_id) FROM devices d",
    "SELECT string_agg(t::text, '|' ORDER BY t::text) FROM device_tokens t",
    "SELECT string_agg(s::text, '|' ORDER BY device_no) FROM device_last_status s",
    "SELECT string_agg(p::text, '|' ORDER BY partition_name) FROM hb_partitions p",
    "SELECT string_agg(inhrelid::regclass::text, '|' ORDER BY inhrelid::regclass::text) FROM pg_inherits",
    "SELECT string_agg(tgname, '|' ORDER BY tgname) FROM pg_trigger WHERE NOT tgisinternal",
    "SELECT string_agg(m::text, '|' ORDER BY version) FROM schema_migrations m",
)


@pytest.fixture(scope="module")
def programs() -> Iterator[postgres_servers.Programs]:
    """Yield the programs of every version of PostgreSQL."""
    with postgres_servers.programs() as programs:
        yield programs


@pytest.fixture(scope="module")
def addresses(programs: postgres_servers.Programs) -> Iterator[dict[str, str]]:
    """Start a server of each version with nexhb's data in it; yield the DSNs by version."""
    with ExitStack() as stack:
        found = {
            one: stack.enter_context(postgres_servers.running(programs.of(one))) for one in postgres_servers.versions()
        }
        for dsn in found.values():
            asyncio.run(_fill(Database(dsn)))
        yield found


async def _fill(database: Database) -> None:
    async with database.connected(application="test") as conn:
        await migrate.migrate(conn, NOW)
        await partitions.ensure(conn, [NOW.date(), NOW.date() + timedelta(days=1)])
        for name in ("kiosk-1", "渋谷店", 'a \\ "quoted" one'):
            await registry.add(conn, name, name)
        await conn.execute(
            """WITH label AS (
                INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
                VALUES ('1.0', '', 'wifi', E'SET transaction_timeout = 0;\\t渋谷\\\\') RETURNING label_no)
            INSERT INTO device_heartbeats
            SELECT $1::timestamptz + n * interval '17 min', $1, device_no, n, label_no, n, NULL, 0.1::real + n, n, -n,
                   true, NULL, false, '10.0.0.1'
            FROM generate_series(0, 99) n, devices, label""",
            NOW,
        )
        await conn.execute(
            "INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at) "
            "SELECT device_no, device_id, $1, $1, $1 FROM devices", NOW,
        )  # fmt: skip


async def _fingerprint(conn: Connection) -> list[str]:
    return [await conn.fetchval(query) for query in FINGERPRINTS]


async def _exchange(conn: Connection, *statements: str) -> None:
    for statement in statements:
        await conn.execute(statement)


def dump_and_restore(
    programs: postgres_servers.Programs, source: str, target: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run the runbook's commands that dump `source` and restore the dump into `target`; return the finished process."""
    [block] = [block for block in blocks(RUNBOOK.read_text(), "sh") if "transaction_timeout" in block]
    lines = [line for line in block.splitlines() if not line.startswith(("export PATH=", "FROM=", "TO="))]
    assert len(lines) == len(block.splitlines()) - 3
    script = "\n".join(lines).replace("/backup/", f"{folder}/")
    environment = {"PATH": f"{programs.of('18')}:/usr/bin:/bin", "FROM": source, "TO": target, "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.product(postgres_servers.versions(), repeat=2) if "18" in pair]
)
async def test_a_dump_of_one_version_can_be_restored_into_another(
    programs: postgres_servers.Programs, addresses: dict[str, str], tmp_path: Path, source: str, target: str
) -> None:
    """Formerly, versions 15 and 16 rejected a dump of version 18 made with the runbook's commands, because the dump
    contains SET transaction_timeout."""
    bare = await asyncpg.connect(addresses[target])
    await _exchange(bare, "DROP DATABASE IF EXISTS back", "CREATE DATABASE back TEMPLATE template0 ENCODING 'UTF8'")
    back = Database(addresses[target].replace("/nexhb?", "/back?"))
    done = dump_and_restore(programs, addresses[source], back.dsn, tmp_path)
    assert done.returncode == 0, done.stderr
    async with Database(addresses[source]).connected(application="test") as source_conn:
        expected = await _fingerprint(source_conn)
    async with back.connected(application="test") as target_conn:
        assert await _fingerprint(target_conn) == expected
        assert await migrate.migrate(target_conn, NOW) == []
        await connections.check_tables(target_conn)
        # nexhb's sessions have the settings that the version supports.
        timeout = await target_conn.fetchval("SELECT current_setting('transaction_timeout', true)")
        assert timeout == (session.AFTER_START["transaction_timeout"] if int(target) >= 17 else None)
    await _exchange(bare, "DROP DATABASE back WITH (FORCE)")
    await bare.close()


async def test_a_dump_that_is_cut_off_leaves_nothing(
    programs: postgres_servers.Programs, addresses: dict[str, str], tmp_path: Path
) -> None:
    """At the end of its input, psql commits what it has read, so the COMMIT must be sent only after the whole dump."""
    bare = await asyncpg.connect(addresses["16"])
    await _exchange(bare, "DROP DATABASE IF EXISTS back", "CREATE DATABASE back TEMPLATE template0 ENCODING 'UTF8'")
    target = addresses["16"].replace("/nexhb?", "/back?")
    cut = tmp_path / "pg_dump"  # replaces the real pg_dump
    cut.write_text(f'#!/bin/bash\n"{programs.of("18")}/pg_dump" "$@" && truncate -s -3000 "{tmp_path}/nexhb.dump"\n')
    cut.chmod(0o755)
    programs_with_cut = tmp_path / "programs"
    programs_with_cut.mkdir()
    for name in ("psql", "pg_restore"):
        (programs_with_cut / name).symlink_to(programs.of("18") / name)
    (programs_with_cut / "pg_dump").symlink_to(cut)

    class CutOff(postgres_servers.Programs):
        def of(self, version: str) -> Path:
            return programs_with_cut

    done = dump_and_restore(CutOff(programs_with_cut), addresses["18"], target, tmp_path)
    assert done.returncode != 0
    async with Database(target).connected(application="test") as conn:
        assert await conn.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    await _exchange(bare, "DROP DATABASE back WITH (FORCE)")
    await bare.close()
