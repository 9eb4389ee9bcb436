"""What every way into the history shares: labels by number, and a temporary table before the keys that may be there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import asyncpg

from nexhb import batch, sql
from nexhb.batch import HISTORY_COLUMNS, Key
from nexhb.db import Connection
from nexhb.wire import Label

_Q = sql.queries("staging")

LABELS_HELD = 100_000


class Labels:
    """Label → number, as far as it is known here. Bounded: full, all are forgotten and learned anew."""

    def __init__(self) -> None:
        self._numbers: dict[Label, int] = {}

    def __getitem__(self, label: Label) -> int:
        return self._numbers[label]

    @property
    def numbers(self) -> Mapping[Label, int]:
        """All that are known; for many at once, since a call costs as much as the look-up."""
        return self._numbers

    async def learn(self, conn: Connection, labels: Iterable[Label]) -> None:
        """Number the labels that are new to us. Outside a transaction: a number must not vanish with it."""
        wanted = set(labels)
        missing = batch.unknown_labels(wanted, self._numbers)
        if not missing:
            return
        if len(self._numbers) + len(missing) > LABELS_HELD:
            self._numbers.clear()
            missing = sorted(wanted)
        await self._find(conn, missing)
        if new := [label for label in missing if label not in self._numbers]:
            await conn.execute(_Q["add_labels"], *zip(*new, strict=True))
            await self._find(conn, new)

    async def _find(self, conn: Connection, labels: Sequence[Label]) -> None:
        for number, *texts in await conn.fetch(_Q["find_labels"], *zip(*labels, strict=True)):
            self._numbers[Label(*texts)] = number


async def stage(conn: Connection, records: Iterable[tuple[object, ...]]) -> None:
    """Rows of HISTORY_COLUMNS into the temporary table that the transaction's end empties. `conn` must use packed
    inet."""
    await conn.execute(_Q["stage_table"])
    await conn.copy_records_to_table("hb_stage", records=records, columns=HISTORY_COLUMNS)


async def insert_staged(conn: Connection) -> set[Key]:
    """Into the history what is not there yet; what was new, by key."""
    return keys(await conn.fetch(_Q["insert_staged"]))


async def clear(conn: Connection) -> None:
    """Empty it within a transaction."""
    await conn.execute(_Q["clear_stage"])


def keys(records: Iterable[asyncpg.Record]) -> set[Key]:
    """The keys of rows that have device_no and bucket."""
    return {batch.key_of(record["device_no"], record["bucket"]) for record in records}
