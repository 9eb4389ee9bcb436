"""What a daemon remembers of the database that it works with, and how an older copy is told from it, step by step."""

from __future__ import annotations

import stat
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from nexhb import devices, identity
from nexhb.db import Connection, Database
from nexhb.errors import DatabaseUnavailable
from nexhb.identity import Lives, Mark, Watched


def lost(generation: int) -> Mark:
    """A generation that this database does not have."""
    return Mark(generation, uuid4())


async def held(conn: Connection, data_dir: Path, generation: int = 500) -> tuple[Lives, Mark]:
    """A daemon that finds an older copy: its data_dir remembers a generation that the database lacks."""
    mark = lost(generation)
    identity.write(data_dir, mark)
    lives = Lives.remembered(data_dir)
    await lives.check(conn)
    assert lives.older == f"The database is an older copy: it lacks generation {generation}."
    return lives, mark


async def test_after_an_accepted_copy_generations_go_on_above_what_it_lacked(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    """A number that was given before would be another daemon's sign that nothing is missing."""
    lives, _ = await held(conn, tmp_path)
    await lives.add(database)
    assert [one.generation for one in await identity.accept(conn, tmp_path)] == [500]
    await lives.check(conn)
    assert lives.older == ""
    await lives.add(database)
    assert await conn.fetchval("SELECT max(generation) FROM database_generations") == 501
    assert identity.read(tmp_path) == lives._mark


async def test_while_a_copy_is_not_accepted_data_dir_remembers_what_it_lacks(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    """Also once the daemon has added a generation to the copy: the next start must find it older, whatever is in it."""
    lives, mark = await held(conn, tmp_path)
    for _ in range(3):
        await lives.add(database)
    assert lives._mark is not None
    assert identity.read(tmp_path) == mark


async def test_of_one_older_copy_after_another_the_first_that_was_lost_counts(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    lives, mark = await held(conn, tmp_path)
    await lives.add(database)
    await conn.execute("DELETE FROM database_generations; DELETE FROM database_missing")  # from before that, too
    before = lives.number
    await lives.check(conn)
    assert (lives.missing, lives.number) == (mark, before + 1)
    assert identity.read(tmp_path) == mark


async def test_a_database_that_comes_back_is_the_one_that_was_lost(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    """The address led to a copy for a while: nobody has to accept anything."""
    lives = Lives(tmp_path)
    await lives.check(conn)
    await lives.add(database)
    mark = lives._mark
    assert mark is not None
    await conn.execute("UPDATE database_generations SET generation = 1000 WHERE mark = $1", mark.mark)
    await lives.check(conn)
    assert lives.missing == mark
    await conn.execute("UPDATE database_generations SET generation = $2 WHERE mark = $1", mark.mark, mark.generation)
    await lives.check(conn)
    assert lives.older == ""


async def test_what_one_daemon_found_missing_holds_for_the_others(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    lives, _ = await held(conn, tmp_path)
    other = Lives()
    await other.check(conn)
    assert other.older == ""
    await lives.add(database)
    await other.check(conn)
    assert other.older == lives.older
    assert [one.generation for one in await identity.missing(conn, tmp_path / "elsewhere")] == [500]


async def test_the_operator_accepts_what_data_dir_alone_remembers(conn: Connection, tmp_path: Path) -> None:
    """No daemon runs, and none has said so in the database yet."""
    identity.write(tmp_path, lost(7))
    assert [one.generation for one in await identity.missing(conn, tmp_path)] == [7]
    assert [one.generation for one in await identity.accept(conn, tmp_path)] == [7]
    assert await identity.missing(conn, tmp_path) == []
    lives = Lives.remembered(tmp_path)
    for _ in range(2):  # found older, and then found accepted
        await lives.check(conn)
    assert lives.older == ""


async def test_what_is_learned_while_a_generation_is_added_is_not_covered_by_it(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    lives.learned([(1, "early"), (2, "another's")])

    class Conn:
        async def fetchrow(self, *_: object) -> dict[str, Any]:
            lives.learned([(2, "late"), (3, "late too")])
            return {"generation": 5, "mark": uuid4()}

        async def execute(self, *_: object) -> None:
            pass

    await lives._add(Conn())  # type: ignore[arg-type]
    assert lives._learned == {2: "late", 3: "late too"}


async def test_a_generation_of_the_database_before_is_not_this_ones(tmp_path: Path) -> None:
    """Found between its commit and its answer: what was learned since would be taken for covered."""
    lives = Lives(tmp_path)

    class Conn:
        async def fetchrow(self, *_: object) -> dict[str, Any]:
            lives.number += 1
            return {"generation": 5, "mark": uuid4()}

    with pytest.raises(DatabaseUnavailable):
        await lives._add(Conn())  # type: ignore[arg-type]
    assert (lives._mark, identity.read(tmp_path)) == (None, None)


async def test_a_device_that_was_learned_and_is_not_there_is_an_older_copy_by_number_and_name(
    conn: Connection,
) -> None:
    await devices.add(conn, "kiosk-1", None)
    for learned, older in ([(1, "kiosk-1")], False), ([(2, "kiosk-1")], True), ([(1, "kiosk-2")], True):
        lives = Lives()
        lives.learned(learned)
        await lives.check(conn)
        assert bool(lives.older) is older, learned


async def test_changes_of_tokens_that_are_missing_are_an_older_copy_and_none_for_ever(
    conn: Connection, now: datetime
) -> None:
    await devices.add(conn, "kiosk-1", None)
    lives = Lives()
    for changes in (1, 3, 1):
        lives.counted(changes)
    await lives.check(conn)
    assert lives.older
    await devices.revoke(conn, "kiosk-1", now)
    lives.missing = None  # it was accepted
    await lives.check(conn)
    assert lives.older == "", "what the one before had counts no more"


async def test_what_is_kept_of_generations_and_of_devices_is_bounded(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "KEPT", 3)
    monkeypatch.setattr(identity, "LEARNED_MOST", 3)
    lives = Lives()
    for number in range(6):
        lives.learned([(number, f"kiosk-{number}")])
    assert len(lives._learned) == 3
    for _ in range(6):
        await lives.add(database)
    rows = await conn.fetch("SELECT generation FROM database_generations ORDER BY generation")
    assert [row["generation"] for row in rows] == [4, 5, 6]


async def test_a_standby_and_a_database_of_another_version_are_not_worked_with(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = dict(identity._Q)
    monkeypatch.setattr(identity, "_Q", queries)
    queries["look"] = queries["look"].replace("pg_is_in_recovery()", "true")
    with pytest.raises(DatabaseUnavailable, match="standby"):
        await Watched.of(database, Lives()).connect(application="test")
    monkeypatch.undo()
    await conn.execute("ALTER TABLE database_generations RENAME TO elsewhere")
    with pytest.raises(DatabaseUnavailable, match="no tables of this version"):
        await Watched.of(database, Lives()).connect(application="test")


def test_what_is_remembered_is_one_file_of_the_owners_and_a_crash_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    first, second = lost(1), lost(2)
    identity.write(folder, first)
    [file] = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def crash(_fd: int) -> None:
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr("os.fsync", crash)
    identity.write(folder, second)  # logged, and no error
    assert identity.read(folder) == first
    monkeypatch.undo()
    identity.write(folder, second)  # though the crash left a file of this process beside it
    assert identity.read(folder) == second
    assert list(folder.iterdir()) == [file]
    file.write_bytes(b"{")
    assert identity.read(folder) is None
    assert identity.read(tmp_path / "nowhere") is None
