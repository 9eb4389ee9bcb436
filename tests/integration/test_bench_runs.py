"""Runs of the bench on real daemons, as small as possible: every row is stored, and every figure is present."""

from __future__ import annotations

from typing import Any

from bench.runs.archive import Archive
from bench.runs.curve import Curve
from bench.runs.daemons import Daemons
from bench.runs.status import Status
from bench.stack import DATABASE_URL, postgres, running


def test_a_day_is_archived_under_load() -> None:
    small = Archive(devices=20, beats=24, interval_s=0.1, jitter_s=0, before_s=2, max_s=30)
    finding = small.run(lambda _: None)
    # Times and bytes per row cannot be measured with so small a day.
    broken = [verdict.name for verdict in finding.verdicts if not verdict.ok]
    assert [name for name in broken if not name.startswith(("p99 of ingest", "bytes of an archived"))] == []
    details: dict[str, Any] = dict(finding.details)
    assert details["ok"] > 100


def test_a_curve_measures_a_fleet_and_the_ceiling() -> None:
    plan = Curve(fleets=(400,), interval_s=4, window_s=1.0, connections=8, closed_connections=4)
    said: list[str] = []
    points, trials = plan.measure(said.append)
    assert said == ["400 devices, 100/s", "400 devices, as fast as possible"]
    assert all(trial.check.ok for trial in trials)
    # number of heartbeats: one per device before the run, and those that the run sends at its rate
    assert points[0].rows == 500
    for point in points:
        assert point.result.p99_ms is not None
        assert point.result.daemon_us is not None
        assert point.known_mb > 0
        assert point.row_bytes > 50
        assert point.batch_mean >= 1


def test_two_daemons_lose_and_double_nothing() -> None:
    plan = Daemons(devices=100, numbers=(1, 2), connections=8, warm_s=0.2, round_s=0.8)
    rounds, check = plan.measure(lambda _: None)
    assert check.ok
    assert all(run.result.sent == run.result.ok > 0 for run in rounds.values())
    assert all((run.result.postgres_us or 0) > 0 for run in rounds.values())


def test_silent_devices_are_listed_while_others_send() -> None:
    plan = Status(devices=3_000, silent=40, unity_down=15, senders=200, rate_per_s=50, requests=4, every_s=0.1)
    finding = plan.run(lambda _: None)
    broken = {verdict.name for verdict in finding.verdicts if not verdict.ok}
    # Verdicts on time are left out, because other work on the machine affects them.
    assert {name for name in broken if "p95" not in name} == set()
    assert "/v1/devices/offline | 40 |" in finding.page[1]


def test_a_postgresql_of_the_run_can_be_stopped_and_started_under_a_daemon() -> None:
    with postgres() as (_, server), running(settings={DATABASE_URL: server.dsn}) as own:
        server.stop()
        assert not own.ready()
        server.start()
        assert own.dsn == server.dsn
