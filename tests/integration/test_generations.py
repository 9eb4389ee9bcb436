"""A daemon remembers the database that it works with, and recognises an older copy of that database, step by step."""

from __future__ import annotations

import stat
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from nexhb.devices import registry
from nexhb.errors import DatabaseUnavailable
from nexhb.postgres import identity
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.identity import CheckedDatabase, DatabaseTracker, Mark


def missing_mark(generation: int) -> Mark:
    """Return a generation that this database does not have."""
    return Mark(generation, uuid4())


async def older_copy_found(conn: Connection, data_dir: Path, generation: int = 500) -> tuple[DatabaseTracker, Mark]:
    """Return a tracker that has found an older copy: its data_dir remembers a generation that the database lacks."""
    mark = missing_mark(generation)
    identity.write(data_dir, mark)
    tracker = DatabaseTracker.load(data_dir)
    await tracker.check(conn)
    assert tracker.older_copy == f"The database is an older copy: it lacks generation {generation}."
    return tracker, mark


async def test_after_a_copy_was_accepted_new_generations_exceed_the_missing_one(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    """If the daemon used the missing number again, another daemon would conclude that no generation is missing."""
    tracker, _ = await older_copy_found(conn, tmp_path)
    await tracker.add(database)
    assert [one.generation for one in await identity.accept(conn, tmp_path)] == [500]
    await tracker.check(conn)
    assert tracker.older_copy == ""
    await tracker.add(database)
    assert await conn.fetchval("SELECT max(generation) FROM database_generations") == 501
    assert identity.read(tmp_path) == tracker._mark


async def test_data_dir_keeps_the_missing_generation_until_the_copy_is_accepted(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    """Even after the daemon has added generations to the copy, the next start must recognise it as an older copy."""
    tracker, mark = await older_copy_found(conn, tmp_path)
    for _ in range(3):
        await tracker.add(database)
    assert tracker._mark is not None
    assert identity.read(tmp_path) == mark


async def test_when_one_older_copy_replaces_another_the_first_missing_generation_counts(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    tracker, mark = await older_copy_found(conn, tmp_path)
    await tracker.add(database)
    await conn.execute("DELETE FROM database_generations; DELETE FROM database_missing")  # a still older copy
    before = tracker.epoch
    await tracker.check(conn)
    assert (tracker.missing, tracker.epoch) == (mark, before + 1)
    assert identity.read(tmp_path) == mark


async def test_when_the_original_database_returns_nothing_needs_to_be_accepted(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    """The address belonged to a copy for a while, and belongs to the original database again."""
    tracker = DatabaseTracker(tmp_path)
    await tracker.check(conn)
    await tracker.add(database)
    mark = tracker._mark
    assert mark is not None
    await conn.execute("UPDATE database_generations SET generation = 1000 WHERE mark = $1", mark.mark)
    await tracker.check(conn)
    assert tracker.missing == mark
    await conn.execute("UPDATE database_generations SET generation = $2 WHERE mark = $1", mark.mark, mark.generation)
    await tracker.check(conn)
    assert tracker.older_copy == ""


async def test_a_generation_that_one_daemon_misses_counts_for_every_daemon(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    tracker, _ = await older_copy_found(conn, tmp_path)
    other = DatabaseTracker()
    await other.check(conn)
    assert other.older_copy == ""
    await tracker.add(database)
    await other.check(conn)
    assert other.older_copy == tracker.older_copy
    assert [one.generation for one in await identity.missing(conn, tmp_path / "elsewhere")] == [500]


async def test_an_operator_can_accept_a_generation_that_only_data_dir_remembers(
    conn: Connection, tmp_path: Path
) -> None:
    """No daemon runs, and none has recorded the missing generation in the database yet."""
    identity.write(tmp_path, missing_mark(7))
    assert [one.generation for one in await identity.missing(conn, tmp_path)] == [7]
    assert [one.generation for one in await identity.accept(conn, tmp_path)] == [7]
    assert await identity.missing(conn, tmp_path) == []
    tracker = DatabaseTracker.load(tmp_path)
    for _ in range(2):  # the first check finds an older copy, the second that it was accepted
        await tracker.check(conn)
    assert tracker.older_copy == ""


async def test_devices_learned_while_a_generation_is_added_are_not_covered_by_it(tmp_path: Path) -> None:
    tracker = DatabaseTracker(tmp_path)
    tracker.note_devices([(1, "early"), (2, "another's")])

    class Conn:
        async def fetchrow(self, *_: object) -> dict[str, Any]:
            tracker.note_devices([(2, "late"), (3, "late too")])
            return {"generation": 5, "mark": uuid4()}

        async def execute(self, *_: object) -> None:
            pass

    await tracker._add(Conn())  # type: ignore[arg-type]
    assert tracker._new_devices == {2: "late", 3: "late too"}


async def test_a_generation_committed_in_a_database_replaced_meanwhile_is_not_remembered(tmp_path: Path) -> None:
    """The database was replaced between the commit and its response: the generation does not cover devices learned
    since."""
    tracker = DatabaseTracker(tmp_path)

    class Conn:
        async def fetchrow(self, *_: object) -> dict[str, Any]:
            tracker.epoch += 1
            return {"generation": 5, "mark": uuid4()}

    with pytest.raises(DatabaseUnavailable):
        await tracker._add(Conn())  # type: ignore[arg-type]
    assert (tracker._mark, identity.read(tmp_path)) == (None, None)


async def test_a_database_that_lacks_a_known_device_by_number_and_id_is_an_older_copy(
    conn: Connection,
) -> None:
    await registry.add(conn, "kiosk-1", None)
    for learned, older in ([(1, "kiosk-1")], False), ([(2, "kiosk-1")], True), ([(1, "kiosk-2")], True):
        tracker = DatabaseTracker()
        tracker.note_devices(learned)
        await tracker.check(conn)
        assert bool(tracker.older_copy) is older, learned


async def test_a_database_with_fewer_token_changes_is_an_older_copy_until_it_is_accepted(
    conn: Connection, now: datetime
) -> None:
    await registry.add(conn, "kiosk-1", None)
    tracker = DatabaseTracker()
    for changes in (1, 3, 1):
        tracker.note_changes(changes)
    await tracker.check(conn)
    assert tracker.older_copy
    await registry.revoke(conn, "kiosk-1", now)
    tracker.missing = None  # an operator accepted the copy
    await tracker.check(conn)
    assert tracker.older_copy == "", "the count of the previous database no longer matters"


async def test_the_numbers_of_stored_generations_and_remembered_devices_are_limited(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "MAX_GENERATIONS", 3)
    monkeypatch.setattr(identity, "MAX_NEW_DEVICES", 3)
    tracker = DatabaseTracker()
    for number in range(6):
        tracker.note_devices([(number, f"kiosk-{number}")])
    assert len(tracker._new_devices) == 3
    for _ in range(6):
        await tracker.add(database)
    rows = await conn.fetch("SELECT generation FROM database_generations ORDER BY generation")
    assert [row["generation"] for row in rows] == [4, 5, 6]


async def test_a_standby_and_a_database_of_another_version_are_rejected(
    database: Database, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = dict(identity._Q)
    monkeypatch.setattr(identity, "_Q", queries)
    queries["look"] = queries["look"].replace("pg_is_in_recovery()", "true")
    with pytest.raises(DatabaseUnavailable, match="standby"):
        await CheckedDatabase.wrap(database, DatabaseTracker()).connect(application="test")
    monkeypatch.undo()
    await conn.execute("ALTER TABLE database_generations RENAME TO elsewhere")
    with pytest.raises(DatabaseUnavailable, match="no tables of this version"):
        await CheckedDatabase.wrap(database, DatabaseTracker()).connect(application="test")


def test_the_generation_file_has_mode_0600_and_a_crash_leaves_the_previous_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    first, second = missing_mark(1), missing_mark(2)
    identity.write(folder, first)
    [file] = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def crash(_fd: int) -> None:
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr("os.fsync", crash)
    identity.write(folder, second)  # the failure is logged, not raised
    assert identity.read(folder) == first
    monkeypatch.undo()
    identity.write(folder, second)  # succeeds although the crash left this process's temporary file
    assert identity.read(folder) == second
    assert list(folder.iterdir()) == [file]
    file.write_bytes(b"{")
    assert identity.read(folder) is None
    assert identity.read(tmp_path / "nowhere") is None
