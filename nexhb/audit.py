"""The ledger of a day against what there is of it: what was ever committed is in the day's table, in its archive, or
among the late ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from nexhb import numbers, partitions, sql
from nexhb.db import Connection
from nexhb.errors import BadInput
from nexhb.partitions import midnight, quoted

_Q = sql.queries("audit")


@dataclass(frozen=True)
class Audit:
    """Both sides, in rows."""

    partition: str
    state: str
    written: int  # by the ledger
    deduplicated: int
    in_table: int
    in_archive: int  # the day's own, as its manifest says, and its supplements
    late: int
    dangling_devices: int = 0  # rows in its table or late ones, of a device that is not there
    dangling_labels: int = 0  # the same of a label: their versions and network are lost

    @property
    def missing(self) -> int:
        """Rows that were committed and are nowhere; below zero: rows that nobody committed."""
        return self.written - self.in_table - self.in_archive - self.late

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, and every row can be read in full."""
        return self.missing == 0 and not self.dangling_devices and not self.dangling_labels

    def shown(self) -> dict[str, Any]:
        """For people and machines."""
        return asdict(self) | {"missing": self.missing, "ok": self.ok}


async def audit(conn: Connection, day: date) -> Audit:
    """Hold one day (UTC) against the ledger, in one snapshot. Raises BadInput for a day that never was."""
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        row = await conn.fetchrow(_Q["day"], midnight(day))
        if row is None:
            raise BadInput(f"There is no day {day}.", hint="`nexhb partitions` lists them.")
        # While its table is there, the table counts: what is archived of it, supplements too, is the same rows.
        in_table = await partitions.count(conn, row["partition_name"]) if row["present"] else 0
        dangling = await numbers.dangling_late(conn, row["range_start"], row["range_end"])
        if row["present"]:
            dangling += await numbers.dangling(conn, quoted(row["partition_name"]))
        archived = 0 if row["present"] else (row["row_count"] or 0) + row["supplements"]
    return Audit(
        partition=row["partition_name"],
        state=row["state"],
        written=row["written"] or 0,
        deduplicated=row["deduplicated"] or 0,
        in_table=in_table,
        in_archive=archived,
        late=row["late"],
        dangling_devices=dangling.devices,
        dangling_labels=dangling.labels,
    )
