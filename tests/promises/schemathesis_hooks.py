"""What docs/openapi.yaml says in words only; schemathesis.toml names this file."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import schemathesis
from hypothesis import strategies as st

from nexhb.texts import unfit
from nexhb.wire import INT16_MAX, INT32_MAX

schemathesis.openapi.format("printable", st.text().filter(lambda text: not unfit(text)))

_MOMENTS = st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2030, 1, 1))  # noqa: DTZ001 - it is written as UTC
_IDS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=100)
_PLACES = st.builds(lambda moment, device_id: f"{moment:%Y-%m-%dT%H:%M:%S.%fZ}/{device_id}", _MOMENTS, _IDS)
schemathesis.openapi.format("place", st.just("") | _PLACES)

_GOOD = b'{"timestamp_utc":"2026-11-24T02:00:00Z"}'
_LINES = st.lists(st.sampled_from([_GOOD, b'{"timestamp_utc":"2026-11-24T02:0', b"", b"7"])).map(
    lambda lines: lines if not any(lines) or _GOOD in lines else [*lines, _GOOD]
)
for lines in ("application/x-ndjson", "application/jsonl"):
    schemathesis.openapi.media_type(lines, _LINES.map(b"\n".join))


@schemathesis.hook
def filter_body(_context: schemathesis.HookContext, body: Any) -> bool:
    """Neither sent as good nor as bad: two numbers whose bounds count only where other fields say nothing. JSON Schema
    could say so, but in a way that nobody could read."""
    if not isinstance(body, dict):
        return True
    recent, network = body.get("monitored_foreground_recent_s"), body.get("network")
    dbm = network.get("signal_dbm") if isinstance(network, dict) else None
    return _within(recent, INT32_MAX) and _within(dbm, INT16_MAX)


def _within(value: object, most: int) -> bool:
    return not isinstance(value, int | float) or abs(value) <= most
