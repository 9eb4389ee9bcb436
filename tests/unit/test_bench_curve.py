"""The pure parts of the fleet's curve: metrics read, a crowd's requests, the formula, verdicts, tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench.compare.command import PAGE
from bench.compare.page import NOT_QUIET, between
from bench.cost import PerHeartbeat
from bench.curve import page
from bench.curve.found import Curve, Memory, Point, verdicts
from bench.curve.wanted import Signals, daemons_wanted
from bench.fleet import BUCKET_US, MICROS, UNITY_PACKAGE
from bench.load import Span, target
from bench.load.crowd import CrowdRequests, crowd
from bench.report import Percentiles
from bench.scenarios import CURVE
from bench.scrape import parse
from nexhb import wire

# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────

BEFORE = """\
# TYPE wait_seconds histogram
wait_seconds_bucket{le="0.1"} 10
wait_seconds_bucket{le="0.2"} 10
wait_seconds_bucket{le="+Inf"} 10
wait_seconds_count 10
wait_seconds_sum 0.5
# TYPE calls counter
calls_total{route="/a"} 4
"""
AFTER = """\
# TYPE wait_seconds histogram
wait_seconds_bucket{le="0.1"} 60
wait_seconds_bucket{le="0.2"} 110
wait_seconds_bucket{le="+Inf"} 110
wait_seconds_count 110
wait_seconds_sum 12.5
# TYPE calls counter
calls_total{route="/a"} 7
calls_total{route="/b"} 2
"""


def test_what_counters_gained_is_summed_over_their_labels() -> None:
    gained = parse(AFTER).since(parse(BEFORE))
    assert gained.value("calls_total") == 5
    assert gained.value("no_such_total") is None
    assert gained.mean("wait_seconds") == 0.12
    assert gained.mean("no_such_seconds") is None


@pytest.mark.parametrize(("q", "expected"), [(0.25, 0.05), (0.5, 0.1), (0.75, 0.15), (1.0, 0.2)])
def test_a_quantile_lies_on_the_straight_line_through_its_bucket(q: float, expected: float) -> None:
    assert parse(AFTER).since(parse(BEFORE)).quantile("wait_seconds", q) == pytest.approx(expected)


def test_a_quantile_beyond_the_last_bound_is_that_bound_and_one_of_nothing_is_none() -> None:
    beyond = 'a_bucket{le="1"} 1\na_bucket{le="+Inf"} 100\n'
    assert parse(f"# TYPE a histogram\n{beyond}").quantile("a", 0.99) == 1
    assert parse(BEFORE).since(parse(BEFORE)).quantile("wait_seconds", 0.99) is None
    assert parse("").quantile("a", 0.5) is None


# ── the crowd ────────────────────────────────────────────────────────────────────────────────────────────

SPAN = Span(1_795_521_600 * MICROS, 2)
TO = target("http://127.0.0.1:8080")
KIOSKS = crowd(1_000, seed=7)


def test_a_crowd_has_tokens_and_ids_of_its_own_and_begins_as_a_larger_one_does() -> None:
    assert len({kiosk.token for kiosk in KIOSKS} | {kiosk.device_id for kiosk in KIOSKS}) == 2_000
    assert crowd(10, seed=7) == KIOSKS[:10]
    assert not set(crowd(10, seed=8)) & set(KIOSKS)
    with pytest.raises(ValueError, match="five digits"):
        crowd(800_000, seed=1)


def test_each_request_is_a_heartbeat_of_its_kiosk_in_a_bucket_of_its_own() -> None:
    requests = CrowdRequests(TO, KIOSKS, SPAN, seed=7)
    assert len(requests) == 2_000
    rules = wire.Rules(UNITY_PACKAGE, 10, timedelta(days=7), timedelta(minutes=5))
    keys, ssids = set(), set()
    for number in range(len(requests)):
        kiosk, ts_us, raw = requests.request(number)
        head, _, body = raw.partition(b"\r\n\r\n")
        assert f"Bearer {KIOSKS[kiosk].token}\r\n".encode() in head
        assert head.endswith(b"Content-Length: %d" % len(body))
        said = json.loads(body)
        assert said["device_id"] == KIOSKS[kiosk].device_id
        assert said["alias"].startswith(f"Store {kiosk // 8:05d} - kiosk ")
        received = datetime.fromtimestamp(ts_us / 1e6, UTC)
        heartbeat = wire.parse(body, device_no=1, device_id="d", received_at=received, rules=rules)
        assert round(heartbeat.ts.timestamp() * 1e6) == ts_us
        assert not heartbeat.clock_wrong
        keys.add((kiosk, ts_us // BUCKET_US))
        ssids.add(heartbeat.label.ssid)
    assert len(keys) == 2_000
    assert {ts // (BUCKET_US // MICROS) for _, ts in ((k, b * 10) for k, b in keys)} == {179_552_160, 179_552_161}
    # stores have networks of their own, so that labels are as many as in life
    assert len(ssids) > 100


def test_a_bucket_is_sent_in_an_order_of_chance_that_comes_again() -> None:
    first, again = (CrowdRequests(TO, KIOSKS, SPAN, seed=7) for _ in range(2))
    order = [first.request(number)[0] for number in range(1_000)]
    assert sorted(order) == list(range(1_000)) != order
    assert order == [again.request(number)[0] for number in range(1_000)]
    later = CrowdRequests(TO, KIOSKS, Span(SPAN.end_us, 1), seed=7)
    assert order != [later.request(number)[0] for number in range(1_000)]


def test_a_token_is_what_is_hashed() -> None:
    assert len(hashlib.sha256(KIOSKS[0].token.encode()).digest()) == 32
    assert len(KIOSKS[0].token) == 43


# ── how many daemons ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("signals", "wanted"),
    [
        (Signals(1, 0.0), 1),
        (Signals(1, 0.6), 1),
        (Signals(1, 0.61), 2),
        (Signals(3, 1.3), 3),
        (Signals(2, 0.3), 1),
        (Signals(1, 0.5, queue_wait_s=0.3), 2),
        (Signals(1, 0.5, loop_lag_s=0.11), 2),
        (Signals(1, 0.5, batch_filled=0.95), 2),
        (Signals(1, 0.5, 0.2, 0.1, 0.9), 1),
        # they wait for PostgreSQL: another one would wait beside them
        (Signals(1, 0.3, queue_wait_s=5), 1),
        (Signals(4, 1.0, queue_wait_s=5), 2),
        # by CPU already more
        (Signals(1, 1.9, queue_wait_s=5), 4),
    ],
)
def test_daemons_are_wanted_by_cpu_and_by_what_waits_for_them(signals: Signals, wanted: int) -> None:
    assert daemons_wanted(signals) == wanted


# ── verdicts and the page ────────────────────────────────────────────────────────────────────────────────

POINT = Point(
    name="33/s",
    devices=2_000,
    heard=2_000,
    due_per_s=33.3,
    sent_per_s=33.3,
    latency=Percentiles(1.0, 2.0, 4.0, 9.0),
    cpu=PerHeartbeat(500, 300),
    daemon_cores=0.03,
    generator_cores=0.02,
    memory=Memory(70, 75, 80),
    start_s=1.0,
    row_bytes=119,
    rows=100_000,
    wal_bytes=500,
    status_bytes=240,
    batch_mean=1.1,
    batch_max=2_000,
    queue_wait_ms=1.5,
    loop_lag_ms=None,
    first_per_s=9_000,
    others_cores=0.05,
)
LARGE = replace(
    POINT, devices=502_000, heard=502_000, due_per_s=8_333, sent_per_s=8_300, cpu=PerHeartbeat(60, 12),
    memory=Memory(320, 400, 420.8), daemon_cores=0.5,
)  # fmt: skip
CEILING = replace(POINT, due_per_s=None, sent_per_s=16_000, daemon_cores=0.9, first_per_s=None)
FOUND = Curve((POINT, LARGE), CEILING, {"memory": "10 kB each"})


def broken(curve: Curve) -> set[str]:
    """The verdicts that are."""
    return {verdict.name for verdict in verdicts(curve) if not verdict.ok}


def test_a_curve_that_keeps_every_floor_but_one_breaks_that_one_alone() -> None:
    assert broken(FOUND) == set()
    for worse, name in (
        (replace(LARGE, sent_per_s=7_000), "502,000 devices: share of the rate really sent"),
        (replace(LARGE, latency=Percentiles(1, 151, 160, 200)), "502,000 devices: p95 below 150 ms"),
        (replace(LARGE, latency=Percentiles(1, 2, 301, 400)), "502,000 devices: p99 below 300 ms"),
        (replace(LARGE, cpu=PerHeartbeat(800, 100)), "CPU of a heartbeat at 502,000 devices, of that at 2,000"),
        (replace(LARGE, memory=Memory(571, 571, 571)), "memory of the daemon for a known device, bytes"),
        (replace(LARGE, row_bytes=131), "502,000 devices: bytes of the history for a heartbeat"),
    ):
        assert broken(replace(FOUND, paces=(POINT, worse))) == {name}
    assert len(broken(replace(FOUND, paces=(POINT, replace(LARGE, latency=Percentiles()))))) == 2


def test_memory_is_of_the_devices_that_the_larger_fleet_has_more() -> None:
    assert (FOUND.known_bytes, FOUND.heard_bytes) == (500, 201)


def test_the_section_has_a_line_for_each_point_and_the_daemons_that_each_wants(tmp_path: Path) -> None:
    where = tmp_path / "performance.md"
    where.write_text(f"Before.\n{page.BEGIN}\n{page.END}\nAfter.\n", encoding="utf-8")
    page.write(where, FOUND, verdicts(FOUND), "today on this")
    text = where.read_text(encoding="utf-8")
    assert "| 502,000 devices, 8,333/s | 8,300 | 1 | 2 | 4 | 60 | 12 | 0.50 | 0.05 |" in text
    assert "| 502,000 devices, 8,333/s | 0.50 | 1.1 | 0.1% | 1.5 | - | 1 |" in text
    assert "| ceiling, 2,000 devices | 0.90 | 1.1 | 0.1% | 1.5 | - | 2 |" in text
    assert "- memory: 10 kB each" in text
    assert "`make bench-curve` writes this section. Measured today on this. " in text
    assert NOT_QUIET not in text
    assert text.endswith(f"{page.END}\nAfter.\n")
    for name, svg in page.charts(FOUND).items():
        assert f"(performance/{name}.svg)" in text
        assert (tmp_path / "performance" / f"{name}.svg").is_file()
        assert ET.fromstring(svg).tag.endswith("svg")  # noqa: S314 - our own
    busy = replace(FOUND, ceiling=replace(CEILING, others_cores=0.4))
    assert NOT_QUIET in page.section(busy, (), "", "")


def test_the_page_that_is_kept_has_its_markers() -> None:
    between(PAGE.read_text(encoding="utf-8"), "", page.BEGIN, page.END)


def test_a_quick_curve_has_the_same_fleets() -> None:
    assert CURVE.quicker().fleets == CURVE.fleets
