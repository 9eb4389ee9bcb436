"""The numbers under which labels are stored, shared by the writer and the import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nexhb.heartbeat import Label
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("labels")

MAX_LABELS = 100_000


class Labels:
    """The numbers of the labels seen so far. When MAX_LABELS are known, all of them are dropped from memory, and are
    read again when they are needed.
    """

    def __init__(self) -> None:
        self._numbers: dict[Label, int] = {}

    def __getitem__(self, label: Label) -> int:
        return self._numbers[label]

    @property
    def numbers(self) -> Mapping[Label, int]:
        """The known labels with their numbers, for callers with many look-ups: a call costs as much as the look-up
        itself."""
        return self._numbers

    async def learn(self, conn: Connection, labels: Iterable[Label]) -> None:
        """Find or create the numbers of labels that are not known yet. Call this outside a transaction, because a
        rollback would undo new numbers."""
        distinct = set(labels)
        missing = unknown_labels(distinct, self._numbers)
        if not missing:
            return
        if len(self._numbers) + len(missing) > MAX_LABELS:
            self._numbers.clear()
            missing = sorted(distinct)
        await self._find(conn, missing)
        if new := [label for label in missing if label not in self._numbers]:
            await conn.execute(_Q["add_labels"], *zip(*new, strict=True))
            await self._find(conn, new)

    async def _find(self, conn: Connection, labels: Sequence[Label]) -> None:
        for number, *texts in await conn.fetch(_Q["find_labels"], *zip(*labels, strict=True)):
            self._numbers[Label(*texts)] = number


def unknown_labels(labels: Iterable[Label], known: Mapping[Label, int]) -> list[Label]:
    """Return the labels that have no number yet, sorted."""
    return sorted(set(labels).difference(known))
