"""A real pgbouncer between the daemon and PostgreSQL: the daemon detects it at the start, names it with the remedy, and
leaves nothing half done through it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from pydantic import SecretStr

from bench.process import free_port
from nexhb import config
from nexhb.errors import PoolerBetween
from nexhb.postgres.connections import POOLER, Database, unsafe_settings
from nexhb.postgres.session import AT_START
from tests.conftest import SOON_S, StartDaemon
from tests.support import forks

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed")
# The settings that nexhb requests at the start of a session and that pgbouncer does not know.
OURS = ", ".join(AT_START)

Bouncer = Callable[[Database, str, str], str]


@pytest.fixture
def bouncer() -> Iterator[Bouncer]:
    """Return a function that starts a pgbouncer in front of a database and returns the address of pgbouncer."""
    with ExitStack() as stack:

        def start(database: Database, pool_mode: str, ignored: str) -> str:
            at = urlsplit(database.dsn)
            sockets = parse_qs(at.query)["host"][0]
            owner = Path(sockets).stat()  # PostgreSQL admits no other user, and pgbouncer does not run as root
            folder = Path(tempfile.mkdtemp(prefix="nexhb-pgbouncer-"))
            stack.callback(shutil.rmtree, folder)
            folder.chmod(0o755)
            port = free_port()
            config = folder / "pgbouncer.ini"
            config.write_text(
                f"[databases]\n* = host={sockets} port=5432 user={at.username}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
                f"listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = {pool_mode}\n"
                f"ignore_startup_parameters = {ignored}\n"
            )
            config.chmod(0o644)
            rights: dict[str, Any] = (
                {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
            )
            assert PROGRAM is not None
            running = subprocess.Popen([PROGRAM, config], cwd="/", stderr=subprocess.DEVNULL, **rights)
            stack.callback(running.wait, 10)
            stack.callback(running.kill)
            while running.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=10).close()
                    break
                except ConnectionRefusedError:
                    continue
            return f"postgresql://{at.username}@127.0.0.1:{port}{at.path}"

        yield start


@pytest.mark.parametrize("ignored", ["", "nexhb.session", OURS])
@pytest.mark.parametrize("mode", ["transaction", "session", "statement"])
async def test_a_daemon_does_not_start_through_pgbouncer_and_prints_a_remedy(
    start_daemon: StartDaemon, bouncer: Bouncer, empty_database: Database, mode: str, ignored: str
) -> None:
    url = SecretStr(bouncer(empty_database, mode, ignored))
    accepting = config.DatabaseSettings(url=url, accept_unsafe_settings=True)
    with pytest.raises(PoolerBetween, match="Connect directly"):
        # The start fails at once, without a minute of retries.
        await asyncio.wait_for(start_daemon(database=accepting), SOON_S / 2)
    async with empty_database.connected(application="test") as conn:
        assert await conn.fetchval("SELECT to_regclass('schema_migrations')") is None


async def test_a_statement_that_another_client_prepared_reveals_a_shared_session(
    bouncer: Bouncer, database: Database
) -> None:
    url = bouncer(database, "transaction", OURS)
    one, other = await asyncpg.connect(url), await asyncpg.connect(url)
    try:
        number = int((await one.prepare("SELECT 1")).get_name().strip("_").rpartition("_")[2], 16)
        for taken in range(number + 1, number + 10):  # as an earlier daemon may have done
            await other.execute(f"PREPARE __asyncpg_stmt_{taken:x}__ AS SELECT 1")
        assert await unsafe_settings(one) == [POOLER]
    finally:
        await one.close()
        await other.close()


def test_serve_ends_with_the_reason_and_without_a_traceback(
    bouncer: Bouncer, database: Database, tmp_path: Path
) -> None:
    settings = {"NEXHB_DATA_DIR": str(tmp_path), "NEXHB_DATABASE__URL": bouncer(database, "transaction", "")}
    done = forks.run("nexhb", ["serve"], env=os.environ | settings, timeout=140)
    assert done.returncode == 1
    assert "Connect directly: set database.url" in done.stderr
    assert "Traceback" not in done.stderr
