"""The keys of a closed loop: as a live fleet makes them, and never the same twice."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bench.fleet import BUCKET_US, MICROS, make_fleet
from bench.load import recent_span, target
from bench.load.pool import RequestPool


def us(text: str) -> int:
    """An instant in µs since 1970."""
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * MICROS


NOON = us("2026-11-24T12:00:07")


def test_a_span_ends_now_and_holds_as_many_buckets_as_are_asked_for() -> None:
    span = recent_span(200_000, 2000, NOON)
    assert span.buckets == 100
    assert span.end_us == us("2026-11-24T12:00:00")


@pytest.mark.parametrize(
    ("now", "end"),
    [("2026-11-24T00:05:00", "2026-11-24T00:00:00"), ("2026-11-24T00:20:00", "2026-11-24T00:20:00")],
)
def test_a_span_lies_in_one_day(now: str, end: str) -> None:
    assert recent_span(200_000, 2000, us(now)).end_us == us(end)


def test_a_span_stays_within_what_the_server_accepts() -> None:
    assert recent_span(10**9, 1, NOON).buckets == 6 * 8640


def test_a_span_ends_before_another_begins() -> None:
    later = recent_span(200_000, 2000, NOON)
    assert recent_span(200_000, 2000, NOON, ends_before_us=later.first_us).end_us == later.first_us


def test_parts_follow_each_other() -> None:
    first, second, third = recent_span(600_000, 2000, NOON).parts(3)
    assert (first.end_us, second.end_us) == (second.first_us, third.first_us)
    assert first.buckets == second.buckets == third.buckets == 100


def test_each_request_is_of_another_key_and_a_devices_only_gets_newer() -> None:
    fleet = make_fleet(30, seed=1)
    span = recent_span(900, 30, NOON)
    pool = RequestPool(target("http://127.0.0.1:1"), fleet, span)
    made = [pool.request(number) for number in range(len(pool))]
    assert len({(device, ts_us // BUCKET_US) for device, ts_us, _ in made}) == len(made) == 900
    newest = [0] * 30
    for device, ts_us, request in made:
        assert span.first_us <= ts_us < span.end_us
        assert ts_us > newest[device]
        newest[device] = ts_us
        stamp = datetime.fromtimestamp(ts_us // MICROS, UTC).strftime('"timestamp_utc":"%Y-%m-%dT%H:%M:%S')
        assert stamp.encode() in request
        head, _, body = request.partition(b"\r\n\r\n")
        assert int(head.rpartition(b" ")[2]) == len(body)
