"""Each import names the devices that NexMDM has deleted since an earlier import, and revokes them only on request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bench.nexmdm import MONOLITHIC, token_hash
from nexhb.devices import registry, tokens
from nexhb.nexmdm import deleted, importing
from nexhb.nexmdm import source as sources
from nexhb.nexmdm.importing import ImportResult
from nexhb.postgres.connections import Connection, Database
from tests.support.commands import nexhb as command
from tests.support.moves import OPTIONS, Move, moving
from tests.support.nexmdm_rows import add_device

DELETE = (
    "DELETE FROM device_heartbeats WHERE device_id = ANY($1::text[])",
    "DELETE FROM devices WHERE id = ANY($1::text[])",
)


@pytest.fixture
async def old(empty_database: Database, conn: Connection, now: datetime) -> AsyncIterator[Move]:
    """Provide a move with kiosk-1 to kiosk-4, which are already imported."""
    async with moving(MONOLITHIC, empty_database, conn, now) as one:
        for n in range(1, 5):
            await add_device(one.source, f"kiosk-{n}", tokens.new_token())
            await one.at(timedelta(hours=n), f"kiosk-{n}")
        await one.run()
        yield one


async def delete(old: Move, *device_ids: str) -> None:
    """Delete devices as NexMDM does: the heartbeats, then the device."""
    for statement in DELETE:
        await old.source.execute(statement, device_ids)


async def revoked(old: Move) -> list[str]:
    """Return the devices that are revoked in nexhb together with their tokens."""
    rows = await old.to.fetch(
        """SELECT device_id FROM devices d WHERE revoked_at IS NOT NULL
        AND NOT EXISTS (SELECT FROM device_tokens t WHERE t.device_no = d.device_no AND t.revoked_at IS NULL)
        ORDER BY 1"""
    )
    return [row[0] for row in rows]


async def test_a_device_deleted_in_nexmdm_is_named_and_revoked_only_on_request(
    old: Move, database: Database, tmp_path: Path
) -> None:
    """NexMDM deletes the device's row at once. Formerly, the import did not mention the device, and its token kept
    working."""
    await delete(old, "kiosk-2", "kiosk-3")
    for _ in range(2):
        found = await old.run(days=0)
        assert (found.deleted.alive, found.deleted.revoked) == (["kiosk-2", "kiosk-3"], [])
        assert await revoked(old) == []
    code, out, _ = await command(database, tmp_path, "import-legacy", "--source", old.dsn, "--days", "0")
    assert code == 0
    assert "deleted in NexMDM but not revoked here: 2: 'kiosk-2', 'kiosk-3'" in out
    words = ("import-legacy", "--source", old.dsn, "--revoke-deleted")
    code, out, _ = await command(database, tmp_path, *words, "--revoke-at-most", "1")
    assert (code, await revoked(old)) == (1, [])
    assert "NOT REVOKED: 2 are more than the limit of 1; --revoke-at-most 2 allows it" in out
    code, out, _ = await command(database, tmp_path, *words)
    assert (code, await revoked(old)) == (0, ["kiosk-2", "kiosk-3"])
    assert "revoked, since NexMDM has deleted them: 2: 'kiosk-2', 'kiosk-3'" in out
    assert (await old.run()).deleted == deleted.DeletedDevices()


async def test_a_readmitted_device_is_not_revoked_a_second_time(old: Move) -> None:
    await delete(old, "kiosk-2")
    assert (await old.run(revoke_deleted=True)).deleted.revoked == ["kiosk-2"]
    await registry.readmit(old.to, "kiosk-2")
    found = await old.run(revoke_deleted=True)
    assert (found.deleted.alive, found.deleted.revoked, await revoked(old)) == (["kiosk-2"], [], [])
    # After NexMDM has had the device again, an import may revoke it again.
    await add_device(old.source, "kiosk-2", tokens.new_token())
    await old.run()
    await delete(old, "kiosk-2")
    assert (await old.run(revoke_deleted=True)).deleted.revoked == ["kiosk-2"]


async def test_a_device_with_a_token_of_nexhbs_own_is_left_to_the_operator(old: Move) -> None:
    await registry.rotate(old.to, "kiosk-2")
    await registry.add(old.to, "ours", None)  # this device never came from a source
    await delete(old, "kiosk-2")
    found = await old.run(revoke_deleted=True)
    assert (found.deleted.alive, found.deleted.own_token, await revoked(old)) == (["kiosk-2"], ["kiosk-2"], [])


async def test_an_adopted_device_counts_as_nexmdms_and_is_revoked(old: Move) -> None:
    token = tokens.new_token()
    await add_device(old.source, "hashed", token_id=None, token_hash=token_hash(token))
    await old.run()
    await old.source.execute("UPDATE devices SET token_id = $1 WHERE id = 'hashed'", tokens.hash_token(token).hex())
    await old.run()
    await delete(old, "hashed")
    assert (await old.run(revoke_deleted=True)).deleted.revoked == ["hashed"]


async def refused(old: Move, **changes: Any) -> ImportResult:
    """Run an import that revokes nothing because its source may be the wrong one."""
    async with sources.opened(old.dsn) as source:
        found = await importing.run(
            replace(source, **changes), old.to, old.now, replace(OPTIONS, revoke_deleted=True), lambda *_: None
        )
    assert (found.deleted.revoked, await revoked(old)) == ([], [])
    assert found.failures[-1].startswith("deleted devices were not revoked: ")
    return found


async def test_an_empty_source_revokes_nothing(old: Move) -> None:
    await delete(old, *(f"kiosk-{n}" for n in range(1, 5)))
    found = await refused(old)
    assert "has none of the devices" in found.deleted.not_revoked_because
    assert len(found.deleted.alive) == 4


async def test_another_servers_devices_under_the_same_name_revoke_nothing(old: Move) -> None:
    await delete(old, *(f"kiosk-{n}" for n in range(1, 5)))
    await add_device(old.source, "other", tokens.new_token())
    # "other" is new in this run: it is not a device of an earlier import, so the source has none of the earlier
    # devices.
    assert "has none of the devices" in (await refused(old)).deleted.not_revoked_because


async def test_an_import_from_another_source_does_not_affect_these_devices(old: Move) -> None:
    await delete(old, "kiosk-2")
    async with sources.opened(old.dsn) as source:
        other = replace(source, name="elsewhere@1")
        options = replace(OPTIONS, revoke_deleted=True)
        found = await importing.run(other, old.to, old.now, options, lambda *_: None)
    assert (found.deleted, await revoked(old)) == (deleted.DeletedDevices(), [])


async def test_a_standby_and_an_older_copy_revoke_nothing(old: Move) -> None:
    """A lagging replica and a restored backup lack devices that enrolled since."""
    await delete(old, "kiosk-2")
    assert "standby" in (await refused(old, is_standby=True)).deleted.not_revoked_because
    await old.source.execute("UPDATE devices SET last_seen = last_seen - interval '1 second' WHERE id = 'kiosk-4'")
    assert "older copy, or lags" in (await refused(old)).deleted.not_revoked_because
    await old.source.execute("UPDATE devices SET last_seen = last_seen + interval '1 minute'")
    assert (await old.run(revoke_deleted=True)).deleted.revoked == ["kiosk-2"]


@pytest.mark.parametrize(
    ("count", "remaining", "imported", "max_revoked", "reason"),
    [
        (10, 5, 15, None, ""), (11, 89, 100, None, "11 are more than the limit of 10"), (100, 900, 1_000, None, ""),
        (101, 899, 1_000, None, "101 are more than the limit of 100"), (101, 899, 1_000, 101, ""),
        (3, 7, 10, 2, "3 are more than the limit of 2"),
        (1, 0, 1, 100, "none of the devices"),
    ],
)  # fmt: skip
def test_the_number_of_devices_revoked_at_once_is_limited(
    count: int, remaining: int, imported: int, max_revoked: int | None, reason: str
) -> None:
    found = deleted.objection(count, remaining, imported, 0, is_standby=False, max_revoked=max_revoked)
    assert found.startswith(reason) if reason.startswith(f"{count}") else reason in found
    assert bool(found) is bool(reason)
