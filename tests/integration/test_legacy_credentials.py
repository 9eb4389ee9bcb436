"""A credential of NexMDM is given once, whatever NexMDM learns of it later and whichever version imported it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from bench.nexmdm import MONOLITHIC, add_device, token_hash, token_id
from nexhb import devices, migrate
from nexhb.db import Connection, Database
from tests.integration.moves import Move, moving

ADOPT = """INSERT INTO device_tokens (token_sha256, device_no) SELECT $1, device_no FROM devices"""


@pytest.fixture
async def old(empty_database: Database, conn: Connection, now: datetime) -> AsyncIterator[Move]:
    """An empty one."""
    async with moving(MONOLITHIC, empty_database, conn, now) as one:
        yield one


async def with_hash(old: Move, token: str) -> str:
    """A device of which NexMDM has nothing but a bcrypt hash; the hash."""
    hashed = token_hash(token)
    await add_device(old.source, "kiosk-1", token_id=None, token_hash=hashed)
    return hashed


async def learns(old: Move, token: str) -> None:
    """NexMDM stores the token's SHA-256 with the first heartbeat that it verifies."""
    await old.source.execute("UPDATE devices SET token_id = $1 WHERE id = 'kiosk-1'", token_id(token))


async def tokens(conn: Connection) -> set[bytes]:
    """Those that work."""
    return {row[0] for row in await conn.fetch("SELECT token_sha256 FROM device_tokens WHERE revoked_at IS NULL")}


async def test_a_token_that_was_rotated_away_does_not_come_back_once_nexmdm_learns_it(old: Move) -> None:
    """A device with a bcrypt hash alone was imported, adopted and rotated here. One heartbeat at NexMDM made that store
    the token's SHA-256, and the next import added the old token again: 401 became 200."""
    token = devices.new_token()
    hashed = await with_hash(old, token)
    await old.run()
    await adopt(old, token, hashed)
    new = devices.hash_token(await devices.rotate(old.to, "kiosk-1"))
    await learns(old, token)
    for _ in range(2):
        found = await old.run(days=0)
        assert (found.devices.tokens_added, found.devices.hashes_waiting) == (0, 0)
        assert await tokens(old.to) == {new}


async def adopt(old: Move, token: str, hashed: str) -> None:
    """As its first heartbeat does."""
    fingerprint = hashlib.sha256(hashed.encode()).digest()
    row = await old.to.fetchrow("SELECT * FROM legacy_tokens")
    assert row is not None
    assert (row["fingerprint"], row["bcrypt"]) == (fingerprint, hashed)
    await old.to.execute(
        "UPDATE legacy_tokens SET bcrypt = NULL, adopted_at = now(), token_sha256 = $1", devices.hash_token(token)
    )
    await old.to.execute(ADOPT, devices.hash_token(token))


async def test_a_device_rotated_before_its_adoption_keeps_its_new_token_alone(old: Move) -> None:
    token = devices.new_token()
    await with_hash(old, token)
    await old.run()
    new = devices.hash_token(await devices.rotate(old.to, "kiosk-1"))
    await learns(old, token)
    assert (await old.run()).devices.tokens_added == 0
    assert await tokens(old.to) == {new}
    # Nor does it come back from a NexMDM that was restored from before it learned the token.
    await old.source.execute("UPDATE devices SET token_id = NULL")
    found = await old.run()
    assert (found.devices.tokens_added, found.devices.hashes_waiting) == (0, 0)


async def test_a_hash_that_waits_is_settled_by_what_nexmdm_learns(old: Move) -> None:
    token = devices.new_token()
    await with_hash(old, token)
    assert (await old.run()).devices.hashes_waiting == 1
    await learns(old, token)
    assert (await old.run()).devices.tokens_added == 1
    assert await tokens(old.to) == {devices.hash_token(token)}
    row = await old.to.fetchrow("SELECT bcrypt, token_sha256 FROM legacy_tokens")
    assert row is not None
    assert tuple(row) == (None, devices.hash_token(token))


async def test_a_device_whose_hash_was_ended_by_hand_gets_the_token_that_nexmdm_learns(old: Move) -> None:
    token = devices.new_token()
    await with_hash(old, token)
    await old.run()
    await old.to.execute("UPDATE legacy_tokens SET bcrypt = NULL")  # as docs/moving.md ends the adoption
    await learns(old, token)
    assert (await old.run()).devices.tokens_added == 1


async def test_a_new_credential_of_a_known_device_is_given(old: Move) -> None:
    await add_device(old.source, "kiosk-1", first := devices.new_token(), token_hash=token_hash(first))
    await old.run()
    second = devices.new_token()
    await old.source.execute("UPDATE devices SET token_hash = $1", token_hash(second))
    await learns(old, second)
    assert (await old.run()).devices.tokens_added == 1
    assert await tokens(old.to) == {devices.hash_token(first), devices.hash_token(second)}


# ---- databases that an earlier version imported -----------------------------------------------------------------

NOW = datetime.now(UTC)


@pytest.fixture
async def before(empty_database: Database) -> AsyncIterator[Connection]:
    """A database of nexhb as migration 0010 left it, with kiosk-1."""
    conn = await empty_database.connect(application="test")
    await migrate.migrate(conn, NOW, migrate.find()[:10])
    await conn.execute("INSERT INTO devices (device_id) VALUES ('kiosk-1')")
    yield conn
    conn.terminate()


async def taken(conn: Connection, fingerprint: bytes, minutes: int, adopted: int | None = None) -> None:
    """A credential as an earlier version recorded it."""
    await conn.execute(
        "INSERT INTO legacy_tokens (device_no, fingerprint, taken_at, adopted_at) VALUES (1, $1, $2, $3)",
        fingerprint, at(minutes), None if adopted is None else at(adopted),
    )  # fmt: skip


async def has(conn: Connection, token: bytes, minutes: int) -> None:
    """A token of it, since then."""
    await conn.execute("INSERT INTO device_tokens VALUES ($1, 1, $2)", token, at(minutes))


def at(minutes: int) -> datetime:
    """So many minutes after the first import."""
    return NOW - timedelta(days=1) + timedelta(minutes=minutes)


OLD, NEW, HASH = devices.hash_token("old"), devices.hash_token("new"), devices.hash_token("hash")


@pytest.mark.parametrize("adopted", [None, 10])
async def test_the_migration_revokes_a_token_that_came_back(before: Connection, adopted: int | None) -> None:
    """Rotated after its adoption, or before it; then NexMDM learned the token, and an import gave it back."""
    await taken(before, HASH, 0, adopted)
    await has(before, NEW, 20)
    await taken(before, OLD, 30)
    await has(before, OLD, 30)
    await migrate.migrate(before, NOW)
    assert await tokens(before) == {NEW}
    assert await before.fetchval("SELECT count(*) FROM device_tokens") == 2  # its device hears 410, and not 401


async def test_the_migration_leaves_every_other_token_alone(before: Connection) -> None:
    # Adopted, and learned by NexMDM later; a token of nexhb's own from before; one that a file added meanwhile.
    await has(before, NEW, -10)
    await taken(before, HASH, 0, 10)
    await has(before, OLD, 10)
    await taken(before, OLD, 30)
    await has(before, devices.hash_token("of a file"), 5)
    await migrate.migrate(before, NOW)
    assert len(await tokens(before)) == 3
    known = await before.fetch("SELECT token_sha256 FROM legacy_tokens ORDER BY taken_at")
    assert [row[0] for row in known] == [OLD, OLD]


@pytest.mark.parametrize("rotated", [False, True])
async def test_a_credential_recorded_by_its_token_is_known_by_its_hash_from_then_on(
    database: Database, before: Connection, conn: Connection, rotated: bool
) -> None:
    """Its fingerprint was the token's SHA-256: the import finds it by that, and replaces it."""
    token = devices.new_token()
    digest, hashed = devices.hash_token(token), token_hash(token)
    await taken(before, digest, 0)
    await has(before, NEW if rotated else digest, 0)
    await migrate.migrate(before, NOW)
    await conn.execute("CREATE SCHEMA nexmdm; SET search_path TO nexmdm")
    source = await database.connect(application="test source")
    await source.execute("SET search_path TO nexmdm")
    await MONOLITHIC.create(source, NOW, NOW)
    await add_device(source, "kiosk-1", token, token_hash=hashed)
    found = await Move(source, before, database.dsn, NOW).run()
    assert found.devices.tokens_added == 0
    assert await tokens(before) == {NEW if rotated else digest}
    row = await before.fetchrow("SELECT fingerprint, token_sha256 FROM legacy_tokens")
    assert row is not None
    assert tuple(row) == (hashlib.sha256(hashed.encode()).digest(), digest)
    await source.close()
