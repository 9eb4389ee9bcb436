"""Adopt a store's manifests: record in the catalog which archives the store has.

This is for a database whose catalog lacks archives: a new database, or one restored from a backup. Nothing in the store
is trusted unchecked: each manifest must be valid, and its name must contain its SHA-256. Existing catalog entries are
never overwritten.
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

from nexhb import log, partitions
from nexhb.archive import late, marker, verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, decode, folder_of, manifest_name
from nexhb.archive.store import ListedStore
from nexhb.errors import ArchiveDamaged, BadInput, StoreError
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("archive")
_log = log.get("archive")

MAX_STORE_OBJECTS = 1_000_000  # the names of this many objects take 80 MB of memory
Progress = Callable[[int, int, str], None]  # called with items processed, items in total, unit of the items


@dataclass(frozen=True)
class AdoptOptions:
    """The operator's options."""

    chosen: frozenset[str] = frozenset()  # names or URLs of the manifests to use for days with several archives
    verify: bool = False  # read every byte of the archives back
    force: bool = False  # accept the store even if it lacks every archive that the catalog records there
    dry_run: bool = False


@dataclass
class AdoptReport:
    """The outcome for each manifest."""

    marked: bool = False
    known: int = 0
    adopted: list[dict[str, Any]] = field(default_factory=list)
    superseded: list[dict[str, Any]] = field(default_factory=list)  # manifests whose rows are in another archive
    present: list[dict[str, Any]] = field(default_factory=list)  # manifests of days whose table is in the database
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left for the operator to decide."""
        return not (self.conflicts or self.refused)


@dataclass(frozen=True)
class _Candidate:
    """A valid manifest in the store that the catalog lacks."""

    name: str
    url: str
    sha256: str
    manifest: Manifest

    def archived(self) -> Archived:
        manifest = self.manifest
        return Archived(manifest.partition, manifest.range_start, manifest.range_end, "dropped", self.url, self.sha256)

    def as_dict(self, reason: str = "") -> dict[str, Any]:
        manifest = self.manifest
        summary = {
            "day": f"{manifest.range_start:%Y-%m-%d}", "partition": manifest.partition, "kind": manifest.kind,
            "rows": manifest.rows, "url": self.url,
        }  # fmt: skip
        return summary | ({"reason": reason} if reason else {})


async def object_names(store: ListedStore, max_names: int) -> set[str]:
    """Return the names of the store's objects, at most `max_names` of them."""
    async with aclosing(store.names(max_names)) as names:
        return {name async for name in names}


async def adopt(
    conn: Connection,
    store: ListedStore,
    spool: Path,
    now: datetime,
    *,
    options: AdoptOptions,
    progress: Progress = lambda *_: None,
) -> AdoptReport:
    """Record the store's archives that the catalog lacks, and accept the store as the one in use.

    The caller holds the lock of the nightly run. Raises StoreError if the store fails, and BadInput if the store has
    none of the archives that the catalog records there.
    """
    names = await object_names(store, MAX_STORE_OBJECTS + 1)
    if len(names) > MAX_STORE_OBJECTS:
        raise BadInput(f"The store has more than {MAX_STORE_OBJECTS:,} objects.")
    adoption = _Adoption(conn, store, spool, now, options, AdoptReport())
    adoption.report.marked = await marker.accept_store(
        conn, store, names, spool, now, force=options.force, dry_run=options.dry_run
    )
    groups = await adoption.read_candidates(sorted(filter(MANIFEST_NAME.fullmatch, names)), progress)
    for done, group in enumerate(groups, 1):
        await adoption.adopt_day(group)
        progress(done, len(groups), "days")
    return adoption.report


@dataclass(frozen=True)
class _Adoption:
    """One run of `adopt`."""

    conn: Connection
    store: ListedStore
    spool: Path
    now: datetime
    options: AdoptOptions
    report: AdoptReport

    async def read_candidates(self, names: Sequence[str], progress: Progress) -> list[list[_Candidate]]:
        """Return the manifests that the catalog lacks, grouped by partition, oldest first."""
        is_superseded = {row["archive_url"]: row["superseded"] for row in await self.conn.fetch(_Q["urls"])}
        groups: dict[str, list[_Candidate]] = defaultdict(list)
        for done, name in enumerate(names, 1):
            url = self.store.url(name)
            if url in is_superseded and not (is_superseded[url] and self._is_chosen(name, url)):
                self.report.known += 1
                continue
            try:
                candidate = await self._read(name, url)
            except (ArchiveDamaged, StoreError) as error:
                self.report.refused.append({"url": url, "reason": str(error)})
            else:
                groups[candidate.manifest.partition].append(candidate)
            progress(done, len(names), "manifests")
        return sorted(groups.values(), key=lambda group: group[0].manifest.range_start)

    def _is_chosen(self, name: str, url: str) -> bool:
        return bool(self.options.chosen & {name, url})

    async def _read(self, name: str, url: str) -> _Candidate:
        raw = b""
        async with aclosing(self.store.get(name)) as chunks:
            async for chunk in chunks:
                raw += chunk
                if len(raw) > MAX_MANIFEST_BYTES:
                    raise ArchiveDamaged(f"{name} is larger than a manifest can be.")
        sha256, manifest = hashlib.sha256(raw).hexdigest(), decode(raw)
        if name != manifest_name(manifest.partition, manifest.kind, sha256):
            raise ArchiveDamaged(f"The content of {name} does not match its name.")
        if manifest.range_end > partitions.midnight(self.now.date()):
            raise ArchiveDamaged(f"{name} is the archive of a day that has not ended.")
        return _Candidate(name, url, sha256, manifest)

    async def adopt_day(self, group: list[_Candidate]) -> None:
        """Adopt the candidates of one partition, or report why they are not adopted."""
        manifest = group[0].manifest
        overlapping = await self.conn.fetch(
            _Q["overlapping"], manifest.partition, manifest.range_start, manifest.range_end
        )
        recorded = next((row for row in overlapping if row["partition_name"] == manifest.partition), None)
        if recorded and recorded["present"]:
            self.report.present += [candidate.as_dict() for candidate in group]
            return
        if another := next((row for row in overlapping if row["partition_name"] != manifest.partition), None):
            self._conflict(group, f"{another['partition_name']} is in the database and overlaps its time range")
            return
        archives = await self._adopt_days(
            [candidate for candidate in group if candidate.manifest.kind == "day"], recorded
        )
        supplements = [candidate for candidate in group if candidate.manifest.kind == "late"]
        if not archives:
            self._conflict(supplements, "the archive of the day itself was not adopted")
            return
        for supplement in supplements:
            await self._adopt_supplement(supplement, archives)

    async def _adopt_days(self, days: list[_Candidate], recorded: Record | None) -> list[Archived]:
        """Adopt one of `days`, which are archives of the same day. Return this day's archives in the catalog, or []."""
        if recorded and recorded["archive_url"]:
            current = await self._in_catalog(recorded)
            for candidate in days:
                if candidate.sha256 == recorded["checksum_sha256"]:  # the same archive, but in a previous store
                    self.report.known += 1
                elif candidate.url != recorded["archive_url"]:
                    await self._resolve_rival(candidate, recorded["archive_url"])
            return current
        eligible = [candidate for candidate in days if self._is_chosen(candidate.name, candidate.url)] or days
        if len(eligible) != 1:
            hint = "; name the one that counts: nexhb archive adopt --take URL" if days else ""
            self._conflict(days, f"there are {len(days)} archives of that day{hint}")
            return []
        [chosen] = eligible
        if not await self._adopt(chosen):
            return []
        for candidate in days:
            if candidate is not chosen:
                await self._supersede(candidate)
        return [chosen.archived()]

    async def _in_catalog(self, recorded: Record) -> list[Archived]:
        rows = await self.conn.fetch(_Q["find"], recorded["range_start"])
        return [
            Archived(
                row["partition_name"], row["range_start"], row["range_end"], row["state"], row["archive_url"],
                row["checksum_sha256"], row["supplement_no"],
            )
            for row in rows if row["archive_url"]
        ]  # fmt: skip

    async def _resolve_rival(self, candidate: _Candidate, current: str) -> None:
        """Supersede `candidate` if the operator chose the catalog's archive of that day; else report a conflict."""
        if self._is_chosen(self.store.name_of(current), current):
            await self._supersede(candidate)
        else:
            self._conflict([candidate], f"the catalog has {current} for that day; to keep it, name its URL with --take")

    def _conflict(self, group: Sequence[_Candidate], reason: str) -> None:
        self.report.conflicts += [candidate.as_dict(reason) for candidate in group]

    async def _supersede(self, candidate: _Candidate) -> None:
        if not self.options.dry_run:
            await self.conn.execute(_Q["supersede"], candidate.url, self.now)
        self.report.superseded.append(candidate.as_dict())

    async def _adopt(self, candidate: _Candidate) -> bool:
        """Record the archive of a day. Return False if the archive is damaged or cannot be read."""
        try:
            verified_at = await self._verify(candidate)
        except (ArchiveDamaged, StoreError) as error:
            self.report.refused.append(candidate.as_dict(str(error)))
            return False
        manifest = candidate.manifest
        if not self.options.dry_run:
            async with self.conn.transaction():
                await self.conn.execute(
                    _Q["adopt_day"], manifest.partition, manifest.range_start, manifest.range_end, manifest.rows,
                    manifest.bytes, candidate.sha256, candidate.url, verified_at,
                )  # fmt: skip
                await self.conn.execute(_Q["not_superseded"], candidate.url)
                await self.conn.execute(_Q["adopt_ledger"], manifest.partition)
            _log.info("archive.adopted", partition=manifest.partition, rows=manifest.rows, url=candidate.url)
        self.report.adopted.append(candidate.as_dict())
        return True

    async def _verify(self, candidate: _Candidate) -> datetime | None:
        if not self.options.verify:
            return None
        await verify.verify(self.store, candidate.name, candidate.sha256, self.spool)
        return self.now

    async def _adopt_supplement(self, candidate: _Candidate, archives: list[Archived]) -> None:
        """Record a supplement, unless the day's archives already have its rows.

        They have the rows if the day was restored and archived again, or if the run that stored the supplement was
        killed.
        """
        manifest = candidate.manifest
        try:
            keys = await late.read_keys(self.store, candidate.archived(), self.spool)
            known = await late.archived_keys(self.store, archives, keys, self.spool)
        except (ArchiveDamaged, StoreError) as error:
            self.report.refused.append(candidate.as_dict(str(error)))
            return
        if known == keys:
            await self._supersede(candidate)
        elif known:
            self._conflict([candidate], f"{len(known)} of its rows are in the day's other archives")
        else:
            if not self.options.dry_run:
                verified_at = self.now if self.options.verify else None
                async with self.conn.transaction():
                    await self.conn.execute(
                        _Q["adopt_supplement"], manifest.partition, candidate.url, candidate.sha256, manifest.rows,
                        manifest.bytes, self.now, verified_at,
                    )  # fmt: skip
                    await self.conn.execute(_Q["not_superseded"], candidate.url)
                    await self.conn.execute(_Q["adopt_ledger"], manifest.partition)
            archives.append(candidate.archived())
            self.report.adopted.append(candidate.as_dict())


@dataclass(frozen=True)
class Differences:
    """Manifests that a store has and the catalog lacks, judged by their names alone."""

    objects_listed: int
    unknown_days: tuple[str, ...]  # manifests of days without an archive in the catalog
    rivals: tuple[str, ...]  # manifests of days for which the catalog has another archive


async def differences(conn: Connection, store: ListedStore, max_names: int) -> Differences:
    """Compare the first `max_names` objects of the store with the catalog. Reads no object."""
    names = await object_names(store, max_names)
    urls = {row["archive_url"] for row in await conn.fetch(_Q["urls"])}
    days = {folder_of(row["partition_name"]): row for row in await partitions.recorded(conn)}
    unknown_days: list[str] = []
    rivals: list[str] = []
    for name in sorted(filter(MANIFEST_NAME.fullmatch, names)):
        row = days.get(name.partition("/")[0])
        if store.url(name) in urls or (row and row["present"]):  # a table that exists is archived by the nightly run
            continue
        (rivals if row and row["archive_url"] else unknown_days).append(name)
    return Differences(len(names), tuple(unknown_days), tuple(rivals))
