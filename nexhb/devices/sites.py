"""Sites: a name, a time zone and opening hours for the devices of one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nexhb.devices import table_file
from nexhb.devices.hours import Hours
from nexhb.devices.registry import check_text
from nexhb.errors import BadInput, SiteInUse, UnknownSite
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection, Connection, lasting
from nexhb.texts import quoted

_Q = sql.queries("sites")

MAX_ID_CHARS = 100
MAX_BAD_LINES = 20  # that an error names


@dataclass(frozen=True)
class Site:
    """A site as an operator sets it."""

    site: str
    name: str | None = None
    zone: str = "UTC"
    hours: str | None = None  # OpenStreetMap's notation; None: always open

    def check(self) -> None:
        """Raise BadInput that names the invalid field."""
        check_text(self.site, "site", MAX_ID_CHARS)
        if self.name is not None:
            check_text(self.name, "name", 200)
        Hours.parse(self.hours, self.zone)


@dataclass(frozen=True)
class KnownSite(Site):
    """A site as the database has it."""

    devices: int = 0  # devices that are not revoked
    online: int = 0  # this and the following: as the watcher has established it
    offline: int = 0
    unity_down: int = 0

    def shown(self, now: datetime) -> dict[str, Any]:
        """Return the site as responses show it."""
        return {
            "site": self.site, "name": self.name, "zone": self.zone, "hours": self.hours,
            "open": Hours.stored(self.hours, self.zone).is_open(now), "devices": self.devices,
            "online": self.online, "offline": self.offline, "unity_down": self.unity_down,
        }  # fmt: skip


def read_file(raw: bytes) -> list[Site]:
    """Return the sites of a CSV file with the columns site, name, zone and hours, as spreadsheets write it. An empty
    cell means the default. Raise BadInput that names the bad lines."""
    found: dict[str, Site] = {}
    bad_lines = []
    for line, cells in table_file.named_cells(raw, ("site", "name", "zone", "hours")):
        given = {column: text for column, text in cells.items() if text}
        site = Site(**{"site": "", **given})
        try:
            site.check()
        except BadInput as error:
            bad_lines.append(f"line {line}: {error.detail}")
        if site.site in found:
            bad_lines.append(f"line {line}: site {quoted(site.site)} is in the file twice.")
        found[site.site] = site
    if bad_lines:
        more = f" And {len(bad_lines) - MAX_BAD_LINES:,} more lines." if len(bad_lines) > MAX_BAD_LINES else ""
        raise BadInput(f"{' '.join(bad_lines[:MAX_BAD_LINES])}{more}", hint="Nothing was imported.")
    return list(found.values())


async def put(conn: Connection, site: Site) -> bool:
    """Create the site or replace all of it, and return whether it is new. Raise BadInput that names the field."""
    site.check()
    async with lasting(conn):
        return bool(await conn.fetchval(_Q["set"], site.site, site.name, site.zone, site.hours))


async def get(conn: AnyConnection, site: str, *, within: Sequence[str] | None = None) -> KnownSite:
    """Return a site. Raise UnknownSite if there is no such site, or if it is not one of the sites `within`, unless that
    is None."""
    is_visible = "\0" not in site and (within is None or site in within)
    found = await page(conn, "", 1, within=[site]) if is_visible else []
    if not found:
        raise unknown(site)
    return found[0]


async def page(conn: AnyConnection, after: str, limit: int, *, within: Sequence[str] | None = None) -> list[KnownSite]:
    """Return up to `limit` sites in the order of their ids, starting after the id `after`; only those `within`, unless
    that is None."""
    return [KnownSite(**dict(record)) for record in await conn.fetch(_Q["page"], after, limit, within)]


async def remove(conn: Connection, site: str) -> None:
    """Remove a site. Its revoked devices then have none. Raise UnknownSite, or SiteInUse if the site has devices that
    are not revoked."""
    async with lasting(conn):
        if "\0" in site or await conn.fetchval(_Q["hold"], site) is None:
            raise unknown(site)
        count = await conn.fetchval(_Q["count_devices"], site)
        if count:
            devices = "1 device" if count == 1 else f"{count:,} devices"
            raise SiteInUse(
                f"{quoted(site)} has {devices}.",
                hint="`nexhb devices set ID --site OTHER` moves a device, `--no-site` takes it out.",
            )
        await conn.execute(_Q["release_revoked"], site)
        await conn.execute(_Q["remove"], site)


def unknown(site: str) -> UnknownSite:
    """Return the error for a site that does not exist."""
    return UnknownSite(f"{quoted(site[:100])}.", hint="`nexhb sites list` shows all sites.")
