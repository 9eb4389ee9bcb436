"""The bench's idle connections, a few of them: none is cut, and the fleet's rows are all there."""

from __future__ import annotations

from dataclasses import replace

from bench.runs import idle
from bench.scenarios import IDLE


def test_idle_connections_stay_and_the_fleet_beside_them_is_served() -> None:
    few = replace(IDLE, connections=400, devices=20, interval_s=2, duration_s=12, until_closed=False)
    finding = idle.run(few)
    kept = {verdict.name: verdict.ok for verdict in finding.verdicts}
    # not those of time and memory: other work on the machine is not this test's
    assert kept["idle connections closed before their time"]
    assert kept["nothing refused"]
    assert kept["nothing failed"]
    assert kept["heartbeats acknowledged"]
    assert kept["acknowledged and not in the database"]
    assert kept["in the database and never sent"]
