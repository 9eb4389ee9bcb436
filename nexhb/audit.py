"""Compare the ledger of a day with its rows: every committed heartbeat is in the day's table, in its archive, or in
late_heartbeats."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from nexhb import partitions
from nexhb.errors import BadInput
from nexhb.partitions import midnight, quoted
from nexhb.postgres import numbers, sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("audit")


@dataclass(frozen=True)
class Audit:
    """What the ledger counts for a day, and the rows that exist."""

    partition: str
    state: str
    written: int  # rows according to the ledger
    deduplicated: int
    in_table: int
    in_archive: int  # rows of the archive, according to its manifest, and of its supplements
    late: int
    dangling_devices: int = 0  # rows in the table or in late_heartbeats that refer to a missing device
    dangling_labels: int = 0  # rows that refer to a missing label: their versions and network are lost

    @property
    def missing(self) -> int:
        """The number of committed rows that are missing everywhere; negative if there are more rows than were
        committed."""
        return self.written - self.in_table - self.in_archive - self.late

    @property
    def ok(self) -> bool:
        """Whether nothing is missing and every row refers to an existing device and label."""
        return self.missing == 0 and not self.dangling_devices and not self.dangling_labels

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of the JSON output."""
        return asdict(self) | {"missing": self.missing, "ok": self.ok}


async def audit(conn: Connection, day: date) -> Audit:
    """Compare one day (UTC) with the ledger, in one snapshot. Raises BadInput for a day that never had a partition."""
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        row = await conn.fetchrow(_Q["day"], midnight(day))
        if row is None:
            raise BadInput(f"There is no partition for {day}.", hint="`nexhb partitions` lists the days.")
        # If the table exists, only its rows count: the archive and the supplements contain the same rows.
        in_table = await partitions.count_rows(conn, row["partition_name"]) if row["present"] else 0
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
