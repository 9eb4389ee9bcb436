"""A message, and its text: what devices and operators have entered is shown, but never interpreted. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from nexhb.texts import shown

MAX_CHARS = 100  # of a name in a text
MAX_DETAIL_CHARS = 300

OPENED, WIDENED, REMINDER, RESOLVED = "opened", "widened", "reminder", "resolved"
TEST, NOT_READY, READY = "test", "not_ready", "ready"

# Chat services turn these characters into mentions, links, formatting and line breaks. The full-width forms look alike,
# and no service interprets them.
_SPECIAL = str.maketrans({char: chr(ord(char) + 0xFEE0) for char in "@#<>&*~|`\\[]"})
_EDGE_UNDERSCORE = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")  # an underscore within a word is not formatting
_LINK_COLON = re.compile(r":(?=[^\s\d])")  # http:, mailto:, tel:
_LINK_DOT = re.compile(r"\.(?=[^\W\d_])")  # the domain of a link; not that of a version or an address
_BLANKS = re.compile(r"\s+")
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060-\u2064\ufeff]")

_STATES = {
    "offline": ("offline", "online again"),
    "unity_down": ("without a running Unity app", "running the Unity app again"),
    "battery_low": ("low on battery", "charged again"),
    "clock_wrong": ("showing a wrong time", "showing the right time again"),
    "token_shared": ("sharing its token with another kiosk", "no longer sharing its token"),
    "flapping": ("going on and off again and again", "stable again"),
    "nightly_failed": ("its nightly run failed", "its nightly run succeeded again"),
    "disk_low": ("its disk is almost full", "its disk has room again"),
}
_HEADS = {OPENED: "", WIDENED: "Wider: ", REMINDER: "Still: ", RESOLVED: "Resolved: "}


@dataclass(frozen=True, slots=True)
class Message:
    """A message to one route. `data` is what a webhook receives, beside the type."""

    message_id: str
    kind: str
    created_at: datetime
    data: Mapping[str, Any]

    @property
    def type(self) -> str:
        """The type of the event, as a webhook receives it."""
        return f"incident.{self.kind}" if self.kind in _HEADS else f"nexhb.{self.kind}"

    def body(self) -> bytes:
        """Return the body of a webhook's request. Every attempt has the same body."""
        value = {"type": self.type, "timestamp": self.created_at, "data": {**self.data, "text": self.title()}}
        return orjson.dumps(value, option=orjson.OPT_UTC_Z | orjson.OPT_SORT_KEYS)

    def title(self) -> str:
        """Return the message in one line."""
        if self.kind == TEST:
            return "A test message of nexhb"
        if self.kind in (NOT_READY, READY):
            host = harmless(self.data.get("host"))
            return f"nexhb on {host} " + ("cannot accept heartbeats" if self.kind == NOT_READY else "is ready again")
        return _HEADS[self.kind] + _sentence(self.data, resolved=self.kind == RESOLVED)

    def text(self) -> str:
        """Return the rest of the message, for people. Its last line has the message's id."""
        lines = [_detail(self.data.get("detail"))] if self.data.get("detail") else []
        lines += [f"{label}: {harmless(self.data[key])}" for key, label in _LINES if self.data.get(key)]
        if remaining := self.data.get("remaining_devices"):
            more = int(self.data.get("remaining", 0)) - len(remaining)
            names = ", ".join(harmless(name) for name in remaining) + (f" and {more} more" if more > 0 else "")
            lines.append(f"still affected: {names}")
        return "\n".join([*lines, self.message_id])


_LINES = (
    ("cause", "cause"), ("severity", "severity"), ("since", "since"), ("resolved_at", "until"), ("site", "site"),
    ("device_id", "device"), ("incident_id", "incident"),
)  # fmt: skip


def harmless(value: object, max_chars: int = MAX_CHARS) -> str:
    """Return a value as text that no chat service interprets, on one line, of limited length."""
    text = _BLANKS.sub(" ", _INVISIBLE.sub("", shown(str(value)))).strip()
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    text = _LINK_DOT.sub("\uff0e", _LINK_COLON.sub("\uff1a", text))
    return _EDGE_UNDERSCORE.sub(lambda match: "\uff3f" * len(match[0]), text).translate(_SPECIAL)


def _detail(value: object) -> str:
    return harmless(value, MAX_DETAIL_CHARS)


def _sentence(data: Mapping[str, Any], *, resolved: bool) -> str:
    states = _STATES.get(str(data.get("kind")), ("in trouble", "all right again"))
    state, scope = states[resolved], data.get("scope")
    if scope == "ours":
        return f"nexhb: {state}"
    if scope == "device":
        name = data.get("device_name") or data.get("device_id")
        where = f" ({harmless(data['site_name'] or data['site'])})" if data.get("site") else ""
        return f"{harmless(name)}{where} is {state}"
    count = int(data.get("devices" if resolved else "members", 0))
    whose = "the fleet" if scope == "fleet" else f"site {harmless(data.get('site_name') or data.get('site'))}"
    verb = "is" if count == 1 else "are"
    remaining = int(data.get("remaining") or 0) if resolved else 0
    but = f", but for {remaining}" if remaining else ""
    return f"{count} device{'s' * (count != 1)} of {whose} {verb} {state}{but}"
