"""A last status asked over HTTP and grown, a small one: what is silent is listed, every heartbeat acknowledged."""

from __future__ import annotations

from dataclasses import replace

from bench.scenarios import STATUS
from bench.status import run
from bench.status.found import verdicts


def test_silent_devices_are_listed_while_others_send() -> None:
    plan = replace(
        STATUS, devices=3_000, silent=40, unity_down=15, senders=200, rate_per_s=50, requests=4, every_s=0.1,
        growth=((500, 5, 3),),
    )  # fmt: skip
    found = run.run(plan, lambda _: None)
    broken = {verdict.name for verdict in verdicts(plan, found) if not verdict.ok}
    # not those of time: other work on the machine is not this test's
    assert {name for name in broken if "p95" not in name and "HOT" not in name} == set()
    assert found.updates > 0
    (grown,) = found.growth
    assert grown.devices == 500
    assert 0 <= grown.hot_share <= 1
    assert grown.after.table_mb >= grown.before.table_mb > 0
