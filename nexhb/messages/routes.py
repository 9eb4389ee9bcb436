"""The routes of messages, made from the settings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from nexhb.config import RouteSettings, Settings
from nexhb.devices.hours import Hours
from nexhb.errors import BadInput, ConfigError
from nexhb.messages import chat

SEVERITIES = ("info", "warning", "critical")


@dataclass(frozen=True, slots=True)
class Route:
    """A route: which messages are sent, and where. `secret` is None for a route of Apprise."""

    name: str
    url: str
    secret: str | None = None
    sites: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    severity: str = "info"
    for_nexhb: bool = False  # also receives messages about nexhb itself
    quiet: Hours | None = None
    reminder: timedelta | None = None
    allow_private: bool = False

    def __repr__(self) -> str:
        return f"Route({self.name!r})"  # the URL and the secret must not be logged

    def is_quiet(self, now: datetime) -> bool:
        """Return whether nothing is sent now."""
        return self.quiet is not None and self.quiet.is_open(now)

    def matches(self, *, kind: str, scope: str, severity: str, site: str | None, tags: Collection[str]) -> bool:
        """Return whether the route receives messages about this incident. An incident of the fleet concerns every site
        and every tag. `tags`: those of the incident's devices."""
        if scope == "ours":
            return self.for_nexhb
        if kind not in self.kinds or SEVERITIES.index(severity) < SEVERITIES.index(self.severity):
            return False
        if scope == "fleet":
            return True
        return (not self.sites or site in self.sites) and (not self.tags or not self.tags.isdisjoint(tags))


def routes_of(settings: Settings) -> Sequence[Route]:
    """Return the routes. Raise ConfigError that names the key."""
    return tuple(_route(each, f"notify.routes[{index}]") for index, each in enumerate(settings.notify.routes))


def _route(each: RouteSettings, key: str) -> Route:
    assert each.url is not None  # noqa: S101 - the settings require it
    url = each.url.get_secret_value()
    if each.secret is None:
        chat.check(url, key)
    return Route(
        name=each.name,
        url=url,
        secret=None if each.secret is None else each.secret.get_secret_value(),
        sites=frozenset(each.match.sites),
        tags=frozenset(each.match.tags),
        kinds=frozenset(each.match.kinds),
        severity=each.match.severity,
        for_nexhb=each.self,
        quiet=_quiet(each, key),
        reminder=timedelta(seconds=each.reminder_seconds) if each.reminder_seconds else None,
        allow_private=each.allow_private,
    )


def _quiet(each: RouteSettings, key: str) -> Hours | None:
    if each.quiet_hours is None:
        return None
    try:
        return Hours.parse(each.quiet_hours, each.quiet_zone)
    except BadInput as error:
        raise ConfigError(f"{key}.quiet_{error.field}: {error.detail}", hint=error.hint) from None
