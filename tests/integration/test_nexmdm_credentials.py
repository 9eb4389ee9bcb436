"""A credential from NexMDM is imported once, whatever NexMDM learns later and whichever version imported it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import pytest

from bench.nexmdm import MONOLITHIC, token_hash, token_id
from nexhb.devices import registry
from nexhb.devices import tokens as device_tokens
from nexhb.postgres import migrate
from nexhb.postgres.connections import Connection, Database
from tests.support.clock import START
from tests.support.moves import Move, moving
from tests.support.nexmdm_rows import add_device

ADOPT = """INSERT INTO device_tokens (token_sha256, device_no) SELECT $1, device_no FROM devices"""


@pytest.fixture
async def old(empty_database: Database, conn: Connection, now: datetime) -> AsyncIterator[Move]:
    """Provide a move from an empty NexMDM."""
    async with moving(MONOLITHIC, empty_database, conn, now) as one:
        yield one


async def with_hash(old: Move, token: str) -> str:
    """Add a device for which NexMDM has only a bcrypt hash; return the hash."""
    hashed = token_hash(token)
    await add_device(old.source, "kiosk-1", token_id=None, token_hash=hashed)
    return hashed


async def learns(old: Move, token: str) -> None:
    """Store the token's SHA-256 as NexMDM does with the first heartbeat that it verifies."""
    await old.source.execute("UPDATE devices SET token_id = $1 WHERE id = 'kiosk-1'", token_id(token))


async def tokens(conn: Connection) -> set[bytes]:
    """Return the tokens that work."""
    return {row[0] for row in await conn.fetch("SELECT token_sha256 FROM device_tokens WHERE revoked_at IS NULL")}


async def test_a_token_replaced_by_rotation_is_not_imported_again_once_nexmdm_learns_it(old: Move) -> None:
    """A device with only a bcrypt hash is imported, adopted and rotated; after one heartbeat, NexMDM stores the old
    token's SHA-256. Formerly, the next import added the old token again: heartbeats with it received 200 and not
    401."""
    token = device_tokens.new_token()
    hashed = await with_hash(old, token)
    await old.run()
    await adopt(old, token, hashed)
    new = device_tokens.hash_token(await registry.rotate(old.to, "kiosk-1"))
    await learns(old, token)
    for _ in range(2):
        found = await old.run(days=0)
        assert (found.devices.tokens_added, found.devices.hashes_waiting) == (0, 0)
        assert await tokens(old.to) == {new}


async def adopt(old: Move, token: str, hashed: str) -> None:
    """Adopt the device as its first heartbeat does."""
    fingerprint = hashlib.sha256(hashed.encode()).digest()
    row = await old.to.fetchrow("SELECT * FROM legacy_tokens")
    assert row is not None
    assert (row["fingerprint"], row["bcrypt"]) == (fingerprint, hashed)
    await old.to.execute(
        "UPDATE legacy_tokens SET bcrypt = NULL, adopted_at = now(), token_sha256 = $1", device_tokens.hash_token(token)
    )
    await old.to.execute(ADOPT, device_tokens.hash_token(token))


async def test_a_device_rotated_before_its_adoption_keeps_only_its_new_token(old: Move) -> None:
    token = device_tokens.new_token()
    await with_hash(old, token)
    await old.run()
    new = device_tokens.hash_token(await registry.rotate(old.to, "kiosk-1"))
    await learns(old, token)
    assert (await old.run()).devices.tokens_added == 0
    assert await tokens(old.to) == {new}
    # Nor is the token added again by an import from a NexMDM that was restored to a state before it learned the token.
    await old.source.execute("UPDATE devices SET token_id = NULL")
    found = await old.run()
    assert (found.devices.tokens_added, found.devices.hashes_waiting) == (0, 0)


async def test_a_waiting_hash_is_replaced_by_the_token_that_nexmdm_learns(old: Move) -> None:
    token = device_tokens.new_token()
    await with_hash(old, token)
    assert (await old.run()).devices.hashes_waiting == 1
    await learns(old, token)
    assert (await old.run()).devices.tokens_added == 1
    assert await tokens(old.to) == {device_tokens.hash_token(token)}
    row = await old.to.fetchrow("SELECT bcrypt, token_sha256 FROM legacy_tokens")
    assert row is not None
    assert tuple(row) == (None, device_tokens.hash_token(token))


async def test_a_device_whose_hash_an_operator_ended_gets_the_token_that_nexmdm_learns(old: Move) -> None:
    token = device_tokens.new_token()
    await with_hash(old, token)
    await old.run()
    await old.to.execute("UPDATE legacy_tokens SET bcrypt = NULL")  # as docs/moving.md ends the adoption
    await learns(old, token)
    assert (await old.run()).devices.tokens_added == 1


async def test_a_new_credential_of_a_known_device_is_imported(old: Move) -> None:
    await add_device(old.source, "kiosk-1", first := device_tokens.new_token(), token_hash=token_hash(first))
    await old.run()
    second = device_tokens.new_token()
    await old.source.execute("UPDATE devices SET token_hash = $1", token_hash(second))
    await learns(old, second)
    assert (await old.run()).devices.tokens_added == 1
    assert await tokens(old.to) == {device_tokens.hash_token(first), device_tokens.hash_token(second)}


# ---- databases that an earlier version imported -----------------------------------------------------------------

NOW = START


@pytest.fixture
async def before(empty_database: Database) -> AsyncIterator[Connection]:
    """Provide a database of nexhb after migration 0010, with kiosk-1."""
    conn = await empty_database.connect(application="test")
    await migrate.migrate(conn, NOW, migrate.find_migrations()[:10])
    await conn.execute("INSERT INTO devices (device_id) VALUES ('kiosk-1')")
    yield conn
    conn.terminate()


async def taken(conn: Connection, fingerprint: bytes, minutes: int, adopted: int | None = None) -> None:
    """Record a credential as an earlier version of nexhb did."""
    await conn.execute(
        "INSERT INTO legacy_tokens (device_no, fingerprint, taken_at, adopted_at) VALUES (1, $1, $2, $3)",
        fingerprint, at(minutes), None if adopted is None else at(adopted),
    )  # fmt: skip


async def has(conn: Connection, token: bytes, minutes: int) -> None:
    """Give the device a token at that time."""
    await conn.execute("INSERT INTO device_tokens VALUES ($1, 1, $2)", token, at(minutes))


def at(minutes: int) -> datetime:
    """Return the time `minutes` minutes after the first import."""
    return NOW - timedelta(days=1) + timedelta(minutes=minutes)


OLD, NEW, HASH = device_tokens.hash_token("old"), device_tokens.hash_token("new"), device_tokens.hash_token("hash")


@pytest.mark.parametrize("adopted", [None, 10])
async def test_the_migration_revokes_a_token_that_came_back(before: Connection, adopted: int | None) -> None:
    """The device was rotated before or after its adoption; then NexMDM learned the old token, and an import added this
    token again."""
    await taken(before, HASH, 0, adopted)
    await has(before, NEW, 20)
    await taken(before, OLD, 30)
    await has(before, OLD, 30)
    await migrate.migrate(before, NOW)
    assert await tokens(before) == {NEW}
    # A device that uses the old token receives 410, not 401.
    assert await before.fetchval("SELECT count(*) FROM device_tokens") == 2


async def test_the_migration_leaves_every_other_token_alone(before: Connection) -> None:
    # One token was adopted and later learned by NexMDM, nexhb issued one before, and one is from an imported file.
    await has(before, NEW, -10)
    await taken(before, HASH, 0, 10)
    await has(before, OLD, 10)
    await taken(before, OLD, 30)
    await has(before, device_tokens.hash_token("of a file"), 5)
    await migrate.migrate(before, NOW)
    assert len(await tokens(before)) == 3
    known = await before.fetch("SELECT token_sha256 FROM legacy_tokens ORDER BY taken_at")
    assert [row[0] for row in known] == [OLD, OLD]


@pytest.mark.parametrize("rotated", [False, True])
async def test_a_credential_recorded_by_its_token_gets_the_fingerprint_of_its_hash(
    database: Database, before: Connection, conn: Connection, rotated: bool
) -> None:
    """In an earlier version, the credential's fingerprint was the token's SHA-256: the import recognises the credential
    by that value, and replaces the fingerprint."""
    token = device_tokens.new_token()
    digest, hashed = device_tokens.hash_token(token), token_hash(token)
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
