"""Decide which faults form one incident: of a device, of a site or of the fleet. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

DEVICE, SITE, FLEET, OURS = "device", "site", "fleet", "ours"
# Faults of these kinds are combined by site and fleet; each other fault is an incident of its device.
COMBINED = frozenset({"offline", "unity_down"})
INFO, WARNING, CRITICAL = "info", "warning", "critical"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a device that belongs to no incident yet."""

    device_no: int
    site: str | None
    kind: str
    since: datetime
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class Incident:
    """An open incident. `members` is the number of devices that have the fault now, `devices` of all that had it."""

    incident_id: int
    kind: str
    scope: str
    site: str | None
    device_no: int | None
    members: int = 0
    devices: int = 0


@dataclass(frozen=True, slots=True)
class Affected:
    """How many devices there are, and how many of them are affected by faults of one kind, of the whole fleet and of
    the sites in question. A device that is overdue counts as affected before it is offline."""

    devices: int
    affected: int
    sites_affected: int  # number of sites with an affected device
    uses_sites: bool
    by_site: Mapping[str, tuple[int, int]]  # site → devices, affected

    def is_fleet(self) -> bool:
        """Return whether the fault affects the fleet: over half of it, in at least two sites if there are any."""
        is_spread = self.sites_affected > 1 or not self.uses_sites
        return self.affected > 1 and self.affected * 2 > self.devices and is_spread

    def is_site(self, site: str | None) -> bool:
        """Return whether the fault affects a site: at least two of its devices, and over half of them."""
        devices, affected = self.by_site.get(site, (0, 0)) if site is not None else (0, 0)
        return affected > 1 and affected * 2 > devices


@dataclass(frozen=True, slots=True)
class Open:
    """Open an incident with these faults, or widen `widens` to it; `absorbs` are combined with it."""

    kind: str
    scope: str
    site: str | None
    faults: Sequence[Fault]
    widens: int | None = None
    absorbs: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Join:
    """Add faults to an open incident."""

    incident_id: int
    faults: Sequence[Fault]


def combine(faults: Sequence[Fault], affected: Affected, opened: Sequence[Incident]) -> list[Open | Join]:
    """Return what to do with new faults of one kind. `opened`: the open incidents of this kind, of the fleet and of the
    faults' sites."""
    kind = faults[0].kind
    if kind not in COMBINED:
        return [Open(kind, DEVICE, fault.site, [fault]) for fault in faults]
    fleet = next((one for one in opened if one.scope == FLEET), None)
    if fleet is not None:
        return [Join(fleet.incident_id, faults)]
    if affected.is_fleet():
        return [_open(kind, FLEET, None, faults, opened)]
    return [
        decision
        for site, of_site in _by_site(faults).items()
        for decision in _combine_in_site(kind, site, of_site, affected, [one for one in opened if one.site == site])
    ]


def _combine_in_site(
    kind: str, site: str | None, faults: Sequence[Fault], affected: Affected, opened: Sequence[Incident]
) -> list[Open | Join]:
    whole = next((one for one in opened if one.scope == SITE), None)
    if whole is not None and site is not None:
        return [Join(whole.incident_id, faults)]
    if affected.is_site(site):
        return [_open(kind, SITE, site, faults, [one for one in opened if one.scope == DEVICE])]
    return [Open(kind, DEVICE, site, [fault]) for fault in faults]


def _open(kind: str, scope: str, site: str | None, faults: Sequence[Fault], opened: Iterable[Incident]) -> Open:
    """Return the incident of a wider scope. The oldest of the incidents that it includes is widened."""
    included = sorted(one.incident_id for one in opened)
    return Open(kind, scope, site, faults, included[0] if included else None, included[1:])


def _by_site(faults: Iterable[Fault]) -> Mapping[str | None, list[Fault]]:
    by_site: dict[str | None, list[Fault]] = defaultdict(list)
    for fault in faults:
        by_site[fault.site].append(fault)
    return by_site


def severity(kind: str, scope: str) -> str:
    """Return how urgent an incident is."""
    if scope != DEVICE:
        return CRITICAL
    return WARNING if kind in COMBINED else INFO


def is_mostly_back(incident: Incident) -> bool:
    """Return whether over half of the devices of a site's or the fleet's incident have recovered."""
    return incident.scope in (SITE, FLEET) and incident.members * 2 < incident.devices
