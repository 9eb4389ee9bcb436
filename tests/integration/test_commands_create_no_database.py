"""Only `serve` and `migrate` create a database. A command that finds no database reports where it looked."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from nexhb import cli
from nexhb.errors import NoDatabase
from nexhb.postgres import embedded, sharing
from nexhb.postgres.connections import Database

# The arguments of each command; a command that is missing here has none.
ARGUMENTS = {
    "archive adopt": "", "archive get": "--device kiosk-1 --day 2026-01-01", "archive list": "",
    "archive restore": "2026-01-01", "archive verify": "--all", "audit": "--day 2026-01-01", "backfill": "--days 1",
    "devices add": "kiosk-1",
    "devices enrolment-key": "", "devices import": "FILE", "devices list": "", "devices readmit": "kiosk-1",
    "devices revoke": "kiosk-1", "devices rotate": "kiosk-1", "doctor": "", "flags": "", "flags set": "perf_diff=on",
    "nightly": "--dry-run", "partitions": "", "perf-diff report": "", "reconcile": "",
}  # fmt: skip
ASK_THE_DAEMON = {
    "device", "devices set", "fleet", "get devices", "get events", "get incidents", "get sites", "history",
    "incident ack", "notify test", "offline", "silence add", "silence list", "silence remove", "sites import",
    "sites list", "sites remove", "sites set", "status", "unity-down", "uptime",
}  # fmt: skip
MAKE_ONE, ASK_NONE = {"migrate", "serve"}, {"config check", *ASK_THE_DAEMON}
NEEDS_A_SOURCE = {"import-legacy"}


def commands(group: Any, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            if command.invoke_without_command:
                yield f"{before}{name}"
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def run(monkeypatch: pytest.MonkeyPatch, words: str) -> int:
    """Run the command, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["nexhb", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder without a configuration, with `none` in it as data_dir."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("NEXHB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NEXHB_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("NEXHB_SERVER__PORT", "0")
    (tmp_path / "devices.csv").write_text(
        "device_id,alias,token\nkiosk-1,,0123456789012345678901234567890123456789012\n"
    )
    return tmp_path


def test_no_command_creates_a_postgresql(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Formerly, `devices add` as another user or in another folder created a second, empty PostgreSQL, and printed a
    token that no daemon knew."""
    run(monkeypatch, "--version")  # registers the commands
    known = set(commands(typer.main.get_command(cli.app)))
    assert known >= MAKE_ONE | ASK_NONE | NEEDS_A_SOURCE
    for name in sorted(known - MAKE_ONE - ASK_NONE - NEEDS_A_SOURCE):
        capsys.readouterr()
        code = run(monkeypatch, f"{name} {ARGUMENTS.get(name, '').replace('FILE', 'devices.csv')}")
        said = "".join(capsys.readouterr())
        assert (name, code) == (name, 1), said
        assert f"No nexhb database was found. The folder {here}/none does not exist." in said, name
        assert f"data_dir is {here}/none: NEXHB_DATA_DIR; the configuration file is none." in said
        assert "`nexhb serve` and `nexhb migrate` create a new database" in said
        assert sorted(path.name for path in here.iterdir()) == ["devices.csv"], name
    (here / "none").mkdir()
    (here / "nexhb.toml").touch()
    assert run(monkeypatch, "devices list") == 1
    said = "".join(capsys.readouterr())
    assert "contains no PostgreSQL cluster (pg)" in said
    assert "the configuration file is nexhb.toml" in said
    (here / "none").rmdir()
    (here / "none").touch()
    assert run(monkeypatch, "devices list") == 1
    assert f"{here}/none is a file." in "".join(capsys.readouterr())


async def test_no_command_creates_tables(
    here: Path, empty_database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """database.url may name another database than the daemon's."""
    monkeypatch.setenv("NEXHB_DATABASE__URL", empty_database.dsn)
    for name in ("devices add", "flags", "nightly", "partitions"):
        capsys.readouterr()
        assert await asyncio.to_thread(run, monkeypatch, f"{name} {ARGUMENTS[name]}") == 1
        said = "".join(capsys.readouterr())
        assert "has no tables of nexhb. Check that database.url, or data_dir, is the daemon's" in said, name
        assert "`nexhb migrate` creates the tables" in said
    assert await asyncio.to_thread(run, monkeypatch, "doctor") == 1
    said = "".join(capsys.readouterr())
    assert "this database has no tables of nexhb" in said
    assert said.count("nexhb migrate") == 1
    conn = await empty_database.connect(application="test")
    assert await conn.fetchval("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == 0
    await conn.close()


async def test_on_an_older_schema_a_command_and_the_doctor_name_the_remedy_once(
    here: Path, database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Formerly, `doctor` reported a failed check for each table or column that the older schema lacks."""
    conn = await database.connect(application="test")
    await conn.execute("DELETE FROM schema_migrations WHERE version = (SELECT max(version) FROM schema_migrations)")
    await conn.execute("DROP TABLE job_runs, feature_flags CASCADE")
    await conn.close()
    monkeypatch.setenv("NEXHB_DATABASE__URL", database.dsn)
    assert await asyncio.to_thread(run, monkeypatch, "devices add kiosk-1") == 1
    assert "Run `nexhb migrate`, or restart the daemon." in capsys.readouterr().err
    assert await asyncio.to_thread(run, monkeypatch, "doctor") == 1
    said = capsys.readouterr().out
    assert said.count("BAD") == said.count("nexhb migrate") == 1
    assert "the check failed" not in said


def test_a_command_waits_for_a_daemon_that_is_creating_its_postgresql() -> None:
    """The command from the README may run before the first start has ended."""
    folder = Path(tempfile.mkdtemp(prefix="nexhb-test-"))
    folder.chmod(0o711)
    made: list[embedded.EmbeddedPostgres] = []
    daemon = threading.Thread(target=lambda: made.append(embedded.start(folder / "data")))
    try:
        with pytest.raises(NoDatabase):
            embedded.start(folder / "data", create=False)
        assert list(folder.iterdir()) == []
        (folder / "left").mkdir(0o711)
        (folder / "left" / sharing.START_LOCK).touch()  # a start that was killed leaves this file
        with pytest.raises(NoDatabase):
            embedded.start(folder / "left", create=False)
        assert not (folder / "left" / "pg").exists()
        daemon.start()
        while not (folder / "data" / sharing.START_LOCK).exists():
            assert daemon.is_alive()
        found = embedded.start(folder / "data", create=False)
        daemon.join()
        assert (found.created, found.adopted, made[0].created) == (False, True, True)
        found.stop()
    finally:
        daemon.join()
        for one in made:
            one.stop()
        shutil.rmtree(folder)
