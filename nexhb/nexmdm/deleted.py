"""Handle devices that an earlier import added and NexMDM has deleted since. NexMDM deletes the whole row of a device,
so that nothing in NexMDM's database shows that the device's token is no longer valid. nexhb accepts the device until
an import or an operator revokes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from nexhb.devices import registry
from nexhb.nexmdm.devices import ImportedDevices
from nexhb.nexmdm.source import NexmdmDatabase
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("nexmdm_import")

# An import revokes at most 10 devices, or a tenth of the imported devices if that is more.
MAX_REVOKED, REVOKED_ONE_IN = 10, 10


@dataclass
class DeletedDevices:
    """The devices that NexMDM has deleted, and what an import did about them."""

    alive: list[str] = field(default_factory=list)  # deleted in NexMDM, not revoked in nexhb
    own_token: list[str] = field(default_factory=list)  # devices in `alive` that have a token from nexhb
    revocable: dict[str, int] = field(default_factory=dict, compare=False)  # device_id → device_no of devices to revoke
    revoked: list[str] = field(default_factory=list)  # devices that this import revoked
    not_revoked_because: str = ""


async def find(source: NexmdmDatabase, conn: Connection, imported: ImportedDevices) -> DeletedDevices:
    """Find the devices that NexMDM has deleted. `imported` are the devices that the source has now."""
    rows = await conn.fetch(_Q["deleted"], source.name, list(imported.numbers.values()))
    return DeletedDevices(
        [row["device_id"] for row in rows],
        [row["device_id"] for row in rows if row["own_token"]],
        {row["device_id"]: row["device_no"] for row in rows if not row["own_token"] and not row["done_before"]},
    )


async def revoke(
    source: NexmdmDatabase, conn: Connection, imported: ImportedDevices, max_revoked: int | None, now: datetime
) -> DeletedDevices:
    """Revoke the deleted devices, unless the source may be the wrong one. Devices that have a token from nexhb, or
    that were readmitted after an import revoked them, are left to the operator."""
    deleted = await find(source, conn, imported)
    to_revoke = dict(deleted.revocable)
    for device_id in await source.existing(
        list(to_revoke)
    ):  # these devices have enrolled again in NexMDM in the meantime
        del to_revoke[device_id]
    if not to_revoke:
        return deleted
    ever_imported = await conn.fetchval(_Q["count_imported"], source.name)
    deleted.not_revoked_because = objection(
        len(to_revoke), imported.known, ever_imported, imported.older,
        is_standby=source.is_standby, max_revoked=max_revoked,
    )  # fmt: skip
    if deleted.not_revoked_because:
        return deleted
    for device_id, device_no in to_revoke.items():
        async with conn.transaction():
            await registry.revoke(conn, device_id, now)
            await conn.execute(_Q["revoked_as_deleted"], source.name, device_no, now)
        deleted.revoked.append(device_id)
    deleted.alive = [device_id for device_id in deleted.alive if device_id not in to_revoke]
    return deleted


def objection(
    deleted: int, remaining: int, imported: int, older: int, *, is_standby: bool, max_revoked: int | None
) -> str:
    """Return why the `deleted` devices must not be revoked, or ''. Earlier imports read `imported` devices from the
    source, which still has `remaining` of them. For `older` of these, an earlier import has read a later last_seen."""
    limit = max(MAX_REVOKED, imported // REVOKED_ONE_IN) if max_revoked is None else max_revoked
    if remaining <= 0:
        return "the source has none of the devices that earlier imports read from it"
    if is_standby:
        return "the source is a standby, which may lag: give the primary"
    if older:
        return f"an earlier import read a later last_seen of {older:,} devices: the source is an older copy, or lags"
    if deleted > limit:
        return f"{deleted:,} are more than the limit of {limit:,}; --revoke-at-most {deleted} allows it"
    return ""
