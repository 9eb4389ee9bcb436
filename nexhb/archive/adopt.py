"""What a store has → the catalog of a database that does not know it: a new one, or one out of a backup.

Nothing in a store is believed before it was looked at: a manifest must be what nexhb writes, under the name that its
own SHA-256 gives it. Nothing that the catalog has is overwritten.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from asyncpg import Record

from nexhb import log, partitions, sql
from nexhb.archive import late, marker, verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import MANIFEST_NAME, MOST_BYTES, Manifest, decode, folder_of, manifest_name
from nexhb.archive.store import ListedStore
from nexhb.db import Connection
from nexhb.errors import ArchiveDamaged, BadInput, StoreError

_Q = sql.queries("archive")
_log = log.get("archive")

MOST_NAMES = 1_000_000  # 80 MB; of objects of a store
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Wishes:
    """What the operator asked for."""

    take: frozenset[str] = frozenset()  # manifests, by name or url, that are a day's archive where there are several
    verify: bool = False  # every byte
    force: bool = False  # the store is the right one though none of the known archives is there
    dry_run: bool = False


@dataclass
class Report:
    """What became of each manifest."""

    marked: bool = False
    known: int = 0
    adopted: list[dict[str, Any]] = field(default_factory=list)
    superseded: list[dict[str, Any]] = field(default_factory=list)  # another archive of the day has their rows
    present: list[dict[str, Any]] = field(default_factory=list)  # the day's table is in the database
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing is left for the operator to decide."""
        return not (self.conflicts or self.refused)


@dataclass(frozen=True)
class _Found:
    """A manifest of the store, looked at."""

    name: str
    url: str
    sha256: str
    manifest: Manifest

    def archived(self) -> Archived:
        one = self.manifest
        return Archived(one.partition, one.range_start, one.range_end, "dropped", self.url, self.sha256)

    def shown(self, reason: str = "") -> dict[str, Any]:
        one = self.manifest
        said = {"day": f"{one.range_start:%Y-%m-%d}", "partition": one.partition, "kind": one.kind, "rows": one.rows}
        return said | {"url": self.url} | ({"reason": reason} if reason else {})


async def names_of(store: ListedStore, most: int) -> set[str]:
    """The names of the store's objects, `most` at most."""
    async with aclosing(store.names(most)) as names:
        return {name async for name in names}


async def adopt(
    conn: Connection, store: ListedStore, spool: Path, now: datetime, *, wishes: Wishes, tell: Tell = lambda *_: None
) -> Report:
    """Write down what the store has and the catalog lacks, and take the store for the right one. Under the lock of the
    nightly run. Raises StoreError, and BadInput where the store has none of the archives that the catalog knows there.
    """
    names = await names_of(store, MOST_NAMES + 1)
    if len(names) > MOST_NAMES:
        raise BadInput(f"The store has more than {MOST_NAMES:,} objects.")
    adoption = _Adoption(conn, store, spool, now, wishes, Report())
    adoption.report.marked = await marker.accept(
        conn, store, names, spool, now, force=wishes.force, dry_run=wishes.dry_run
    )
    groups = await adoption.look(sorted(filter(MANIFEST_NAME.fullmatch, names)), tell)
    for done, group in enumerate(groups, 1):
        await adoption.day(group)
        tell(done, len(groups), "days")
    return adoption.report


@dataclass(frozen=True)
class _Adoption:
    """One adoption."""

    conn: Connection
    store: ListedStore
    spool: Path
    now: datetime
    wishes: Wishes
    report: Report

    async def look(self, names: Sequence[str], tell: Tell) -> list[list[_Found]]:
        """The manifests that the catalog lacks, by partition, the oldest first."""
        urls = {row["archive_url"]: row["superseded"] for row in await self.conn.fetch(_Q["urls"])}
        groups: dict[str, list[_Found]] = defaultdict(list)
        for done, name in enumerate(names, 1):
            url = self.store.url(name)
            if url in urls and not (urls[url] and self._taken(name, url)):
                self.report.known += 1
                continue
            try:
                found = await self._read(name, url)
            except (ArchiveDamaged, StoreError) as error:
                self.report.refused.append({"url": url, "reason": str(error)})
            else:
                groups[found.manifest.partition].append(found)
            tell(done, len(names), "manifests")
        return sorted(groups.values(), key=lambda group: group[0].manifest.range_start)

    def _taken(self, name: str, url: str) -> bool:
        return bool(self.wishes.take & {name, url})

    async def _read(self, name: str, url: str) -> _Found:
        raw = b""
        async with aclosing(self.store.get(name)) as chunks:
            async for chunk in chunks:
                raw += chunk
                if len(raw) > MOST_BYTES:
                    raise ArchiveDamaged(f"{name} is larger than a manifest can be.")
        sha256, manifest = hashlib.sha256(raw).hexdigest(), decode(raw)
        if name != manifest_name(manifest.partition, manifest.kind, sha256):
            raise ArchiveDamaged(f"{name} is not the manifest that its name says.")
        if manifest.range_end > partitions.midnight(self.now.date()):
            raise ArchiveDamaged(f"{name} is of a day that is not over.")
        return _Found(name, url, sha256, manifest)

    async def day(self, group: list[_Found]) -> None:
        """Adopt what the store has of one partition, or say why not."""
        one = group[0].manifest
        around = await self.conn.fetch(_Q["around"], one.partition, one.range_start, one.range_end)
        mine = next((row for row in around if row["partition_name"] == one.partition), None)
        if mine and mine["present"]:
            self.report.present += [found.shown() for found in group]
            return
        if other := next((row for row in around if row["partition_name"] != one.partition), None):
            self._conflict(group, f"{other['partition_name']} is in the database and has some of its time")
            return
        archives = await self._of_the_day([found for found in group if found.manifest.kind == "day"], mine)
        supplements = [found for found in group if found.manifest.kind == "late"]
        if not archives:
            self._conflict(supplements, "the day's own archive is not taken over")
            return
        for found in supplements:
            await self._supplement(found, archives)

    async def _of_the_day(self, days: list[_Found], mine: Record | None) -> list[Archived]:
        """The day's archives in the catalog once one of `days` is adopted; none where it has none."""
        if mine and mine["archive_url"]:
            current = await self._in_catalog(mine)
            for found in days:
                if found.sha256 == mine["checksum_sha256"]:  # the same one, in a former store
                    self.report.known += 1
                elif found.url != mine["archive_url"]:
                    await self._other(found, mine["archive_url"])
            return current
        taken = [found for found in days if self._taken(found.name, found.url)] or days
        if len(taken) != 1:
            hint = "; name the one that counts: nexhb archive adopt --take URL" if days else ""
            self._conflict(days, f"there are {len(days)} archives of that day{hint}")
            return []
        [chosen] = taken
        if not await self._adopt(chosen):
            return []
        for found in days:
            if found is not chosen:
                await self._supersede(found)
        return [chosen.archived()]

    async def _in_catalog(self, mine: Record) -> list[Archived]:
        rows = await self.conn.fetch(_Q["find"], mine["range_start"])
        return [
            Archived(
                row["partition_name"], row["range_start"], row["range_end"], row["state"], row["archive_url"],
                row["checksum_sha256"], row["supplement_no"],
            )
            for row in rows if row["archive_url"]
        ]  # fmt: skip

    async def _other(self, found: _Found, current: str) -> None:
        """Another archive of a day that has one: what the operator says counts is the catalog's, or nothing."""
        if self._taken(self.store.name_of(current), current):
            await self._supersede(found)
        else:
            self._conflict([found], f"the catalog has {current} for that day; to keep that: --take with its URL")

    def _conflict(self, group: Sequence[_Found], reason: str) -> None:
        self.report.conflicts += [found.shown(reason) for found in group]

    async def _supersede(self, found: _Found) -> None:
        if not self.wishes.dry_run:
            await self.conn.execute(_Q["supersede"], found.url, self.now)
        self.report.superseded.append(found.shown())

    async def _adopt(self, found: _Found) -> bool:
        """Write the day's archive down."""
        try:
            verified_at = await self._verified(found)
        except (ArchiveDamaged, StoreError) as error:
            self.report.refused.append(found.shown(str(error)))
            return False
        one = found.manifest
        if not self.wishes.dry_run:
            async with self.conn.transaction():
                await self.conn.execute(
                    _Q["adopt_day"], one.partition, one.range_start, one.range_end, one.rows, one.bytes, found.sha256,
                    found.url, verified_at,
                )  # fmt: skip
                await self.conn.execute(_Q["not_superseded"], found.url)
                await self.conn.execute(_Q["adopt_ledger"], one.partition)
            _log.info("archive.adopted", partition=one.partition, rows=one.rows, url=found.url)
        self.report.adopted.append(found.shown())
        return True

    async def _verified(self, found: _Found) -> datetime | None:
        if not self.wishes.verify:
            return None
        await verify.verify(self.store, found.name, found.sha256, self.spool)
        return self.now

    async def _supplement(self, found: _Found, archives: list[Archived]) -> None:
        """Write a supplement down, unless its rows are in the day's archives already: those of a day that came back and
        was archived again, and what a run that was killed had stored."""
        one = found.manifest
        try:
            beats = await late.beats_of(self.store, found.archived(), self.spool)
            known = await late.known(self.store, archives, beats, self.spool)
        except (ArchiveDamaged, StoreError) as error:
            self.report.refused.append(found.shown(str(error)))
            return
        if known == beats:
            await self._supersede(found)
        elif known:
            self._conflict([found], f"{len(known)} of its rows are in the day's other archives")
        else:
            if not self.wishes.dry_run:
                verified_at = self.now if self.wishes.verify else None
                async with self.conn.transaction():
                    await self.conn.execute(
                        _Q["adopt_supplement"], one.partition, found.url, found.sha256, one.rows, one.bytes, self.now,
                        verified_at,
                    )  # fmt: skip
                    await self.conn.execute(_Q["not_superseded"], found.url)
                    await self.conn.execute(_Q["adopt_ledger"], one.partition)
            archives.append(found.archived())
            self.report.adopted.append(found.shown())


@dataclass(frozen=True)
class Differences:
    """What a store has and the catalog does not, by the names alone."""

    looked_at: int
    lacking: tuple[str, ...]  # manifests of days without an archive in the catalog
    others: tuple[str, ...]  # of days that have another one there


async def differences(conn: Connection, store: ListedStore, most: int) -> Differences:
    """Of the first `most` objects; none of them is read."""
    names = await names_of(store, most)
    urls = {row["archive_url"] for row in await conn.fetch(_Q["urls"])}
    days = {folder_of(row["partition_name"]): row for row in await partitions.known(conn)}
    lacking: list[str] = []
    others: list[str] = []
    for name in sorted(filter(MANIFEST_NAME.fullmatch, names)):
        row = days.get(name.partition("/")[0])
        if store.url(name) in urls or (row and row["present"]):  # a table that is there is archived by the nightly run
            continue
        (others if row and row["archive_url"] else lacking).append(name)
    return Differences(len(names), tuple(lacking), tuple(others))
