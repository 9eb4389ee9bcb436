"""The limits of the comparison, of the curve and of the overload: each limit is broken by what it forbids, and by
nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.floors import Floors
from bench.report import Outcome, Percentiles, Result, SendLog
from bench.runs import compare as f
from bench.runs.compare import Comparison
from bench.runs.curve import Point, known_bytes, verdicts_of
from bench.runs.overload import recovered_s

RESULT = Result(
    mode="", devices=1, duration_s=1, sent=1, ok=1, refused=0, failed=0, deduplicated=0, p50_ms=1, p95_ms=2, p99_ms=4,
    max_ms=9, rate_per_s=33.3, statuses={}, failures={}, late_sends_p99_ms=None, connections_opened=1, generator_us=1,
    daemon_us=500, postgres_us=300, daemon_cores=0.1, others_cores=0,
)  # fmt: skip


def rates(**changes: float) -> dict[tuple[str, int], Result]:
    """Return the rounds of each server with its rate."""
    per_s = {
        f.BARE: 30_000.0, f.NEXHB: 18_000.0, f.FASTAPI: 2_000.0, f.NEXMDM: 400.0, f.NEXMDM_BCRYPT: 5.0,
        **dict.fromkeys(f.FORMS, 60_000.0), **changes,
    }  # fmt: skip
    slow = replace(RESULT, rate_per_s=1)
    return {(name, 64): replace(RESULT, rate_per_s=rate) for name, rate in per_s.items()} | {(f.NEXHB, 2): slow}


COMPARED = Comparison(rates(), (90_000, 100_000, 110_000), Percentiles(1.5, 2.5, 6.5, 12), Floors(0.3, 0.05), 0)
ARRAY, NDJSON = f.FORMS


def broken(compared: Comparison) -> set[str]:
    """Return the names of the broken verdicts."""
    return {verdict.name for verdict in compared.verdicts() if not verdict.ok}


@pytest.mark.parametrize(
    ("server", "per_s", "verdict"),
    [
        (f.BARE, 40_000, "single heartbeats: share of the bare handler's rate"),
        (f.FASTAPI, 2_300, "times FastAPI + INSERT"),
        (f.NEXMDM, 460, "rate as a multiple of NexMDM's path without bcrypt"),
        (f.NEXMDM_BCRYPT, 19, "rate as a multiple of NexMDM's path"),
        (ARRAY, 39_000, f"{ARRAY}: share of raw COPY's rows/s"),
    ],
)
def test_a_server_that_is_too_fast_or_too_slow_breaks_its_limit_alone(server: str, per_s: float, verdict: str) -> None:
    assert broken(COMPARED) == set()
    assert broken(replace(COMPARED, lanes=rates(**{server: per_s}))) == {verdict}


def test_the_comparison_limits_the_p99_by_the_commit_and_counts_the_rows_of_peers() -> None:
    assert COMPARED.p99_bound_ms == 6.5
    assert len(broken(replace(COMPARED, steady=Percentiles(1, 2, 6.6, 9)))) == 1
    assert len(broken(replace(COMPARED, steady=Percentiles()))) == 1
    assert len(broken(replace(COMPARED, lost_by_peers=1))) == 1


def test_the_page_compares_every_line_with_the_best_of_nexhb() -> None:
    text = "\n".join(COMPARED.page())
    assert f"| {f.FASTAPI} | 64 | 2,000 | 1 | 2 | 4 | 500 | 300 | 0.10 | 0.00 | 9 |" in text
    assert f"| {f.NEXHB} | 2 | 1 |" in text


POINT = Point(2_000, 33.3, RESULT, known_mb=70, end_mb=80, rows=100_000, row_bytes=119, batch_mean=1.1)
LARGE_RESULT = replace(RESULT, rate_per_s=8_300, daemon_us=60, postgres_us=12)
LARGE = POINT._replace(devices=502_000, due_per_s=8_333, result=LARGE_RESULT, known_mb=320)


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        (LARGE._replace(result=replace(LARGE_RESULT, rate_per_s=7_000)), "502,000 devices: share of the rate"),
        (LARGE._replace(result=replace(LARGE_RESULT, p95_ms=151)), "502,000 devices: p95 below 150 ms"),
        (LARGE._replace(result=replace(LARGE_RESULT, p99_ms=None)), "502,000 devices: p99 below 300 ms"),
        (LARGE._replace(result=replace(LARGE_RESULT, daemon_us=900)), "CPU of a heartbeat at 502,000 devices"),
        (LARGE._replace(known_mb=571), "memory of the daemon for a known device"),
        (LARGE._replace(row_bytes=131), "502,000 devices: bytes of the history"),
    ],
)
def test_a_curve_that_keeps_every_limit_but_one_breaks_that_one_alone(worse: Point, name: str) -> None:
    assert all(verdict.ok for verdict in verdicts_of((POINT, LARGE)))
    (verdict,) = (each for each in verdicts_of((POINT, worse)) if not each.ok)
    assert verdict.name.startswith(name)


def test_memory_is_of_the_devices_that_the_larger_fleet_has_more() -> None:
    assert known_bytes((POINT, LARGE)) == 500


def sends_of(*seconds: tuple[float, Outcome]) -> SendLog:
    """Return a record with a send in each second. A send is given as its latency in seconds and its outcome."""
    log = SendLog()
    for second, (latency_s, outcome) in enumerate(seconds):
        send_no = log.add(0, 0, second * 1_000_000 + 500_000)
        log.latency_s[send_no], log.outcome[send_no] = latency_s, outcome
    return log


def test_full_service_is_three_calm_seconds_in_a_row() -> None:
    calm, slow, refused = (0.01, Outcome.WRITTEN), (0.2, Outcome.WRITTEN), (0.01, Outcome.REFUSED)
    assert recovered_s(sends_of(refused, calm, calm, calm), 1, 4, calm_ms=150) == 0
    assert recovered_s(sends_of(slow, calm, refused, calm, calm, calm, slow), 0, 7, calm_ms=150) == 3
    assert recovered_s(sends_of(calm, calm, slow, calm, calm), 0, 5, calm_ms=150) is None
    # a second without sends is not calm
    assert recovered_s(SendLog(), 0, 3, calm_ms=150) is None


def test_the_sends_of_a_period_are_those_that_were_due_in_it() -> None:
    part = sends_of((0.1, Outcome.WRITTEN), (0.2, Outcome.REFUSED), (0.3, Outcome.WRITTEN)).due_in(1, 3)
    assert (len(part), part.latencies(), part.latencies(Outcome.REFUSED)) == (2, [0.3], [0.2])
