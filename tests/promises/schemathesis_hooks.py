"""Define what docs/openapi.yaml says only in words; schemathesis.toml names this file."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import schemathesis
from hypothesis import strategies as st

from nexhb.heartbeat import INT16_MAX, INT32_MAX
from nexhb.texts import unfit

schemathesis.openapi.format("printable", st.text().filter(lambda text: not unfit(text)))

_MOMENTS = st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2030, 1, 1))  # noqa: DTZ001 - it is written as UTC
_IDS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=100)
_PLACES = st.builds(lambda moment, device_id: f"{moment:%Y-%m-%dT%H:%M:%S.%fZ}/{device_id}", _MOMENTS, _IDS)
schemathesis.openapi.format("place", st.just("") | _PLACES)

schemathesis.openapi.format("silenced", st.sampled_from(["store-1", "outdoor", "kiosk-1"]))  # a site, a tag, a device
schemathesis.openapi.format("future", st.just(f"{datetime.now(UTC) + timedelta(days=30):%Y-%m-%dT%H:%M:%S}+02:00"))
schemathesis.openapi.format("past", st.just("2020-01-01T00:00:00Z"))
schemathesis.openapi.format("site", st.sampled_from(["store-1", "store-2"]))  # test_openapi.py creates them
_DAYS = st.integers(1, 300).map(lambda days: f"{datetime.now(UTC).date() - timedelta(days=days)}")
schemathesis.openapi.format("day_of_last_year", _DAYS | _DAYS.map("{}T12:00:00Z".format))
schemathesis.openapi.format("later_day", st.sampled_from(["2099-12-31", "2099-01-01T00:00:00+01:00"]))
schemathesis.openapi.format("zone", st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"]))
schemathesis.openapi.format("hours", st.sampled_from(["24/7", "Mo-Fr 08:00-20:00; Sa off", "22:00-06:00"]))
schemathesis.openapi.format("tag", st.from_regex(r"[a-z0-9._-]{1,50}", fullmatch=True))

_GOOD = b'{"timestamp_utc":"2026-11-24T02:00:00Z"}'
_LINES = st.lists(st.sampled_from([_GOOD, b'{"timestamp_utc":"2026-11-24T02:0', b"", b"7"])).map(
    lambda lines: lines if not any(lines) or _GOOD in lines else [*lines, _GOOD]
)
for lines in ("application/x-ndjson", "application/jsonl"):
    schemathesis.openapi.media_type(lines, _LINES.map(b"\n".join))


@schemathesis.hook
def filter_body(_context: schemathesis.HookContext, body: Any) -> bool:
    """Return whether to send the body. Two numbers beyond their limits are sent neither as valid nor as invalid, since
    these limits apply only if other fields are absent. JSON Schema could express that, but nobody could read it."""
    if not isinstance(body, dict):
        return True
    recent, network = body.get("monitored_foreground_recent_s"), body.get("network")
    dbm = network.get("signal_dbm") if isinstance(network, dict) else None
    return _within(recent, INT32_MAX) and _within(dbm, INT16_MAX)


def _within(value: object, most: int) -> bool:
    return not isinstance(value, int | float) or abs(value) <= most
