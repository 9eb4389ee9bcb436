"""Decide which message is due about an incident on a route, from what the route was told. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from nexhb.messages.message import OPENED, REMINDER, RESOLVED, WIDENED

ANOTHER_FAULT = (
    ""  # the scope of what a route was told, if it was told of a fault that this one replaces, but not of this
)
_WIDTH = {"device": 0, "site": 1, "fleet": 2, "ours": 2}


@dataclass(frozen=True, slots=True)
class Told:
    """What a route was told of an incident: the widest scope (or ANOTHER_FAULT), and when it was last told that the
    incident is open."""

    scope: str
    reminded_at: datetime


@dataclass(frozen=True, slots=True)
class Present:
    """The present state of an incident."""

    scope: str
    is_open: bool
    is_acked: bool = False


def due(
    present: Present, told: Told | None, now: datetime, *, matches: bool, held: bool, reminder: timedelta | None
) -> str | None:
    """Return the kind of the message that is due, or None. `held`: nothing may be sent now, because of a silence, quiet
    hours or closed hours. Whether a message is due is decided again afterwards, so no message is ever sent about an
    incident that opened and was resolved meanwhile."""
    if held:
        return None
    if not present.is_open:
        return None if told is None else RESOLVED
    if told is None or told.scope == ANOTHER_FAULT:
        return OPENED if matches else None
    if _WIDTH[present.scope] > _WIDTH[told.scope]:
        return WIDENED
    is_reminder_due = reminder is not None and now - told.reminded_at >= reminder
    return REMINDER if is_reminder_due and not present.is_acked else None
