"""Several daemons on one PostgreSQL, for a moment: nothing lost, nothing doubled, one of them runs the job."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from bench.daemons import hosts, run
from bench.daemons.found import verdicts
from bench.scenarios import DAEMONS


def test_two_daemons_lose_and_double_nothing_and_one_runs_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    # the way without namespaces, which not every machine has
    monkeypatch.setattr(hosts, "lacking", lambda: "not in a test")
    plan = replace(
        DAEMONS, devices=100, numbers=(2,), connections=8, warm_s=0.2, round_s=0.8, copies_connections=4, old_beats=400,
    )  # fmt: skip
    found = run.run(plan, lambda _: None)
    assert [verdict.name for verdict in verdicts(found) if not verdict.ok] == []
    assert found.copies.heartbeats == 500
    assert found.no_hosts == "not in a test"
    (both,) = found.rounds
    assert both.rate_per_s > 0


@pytest.mark.skipif(bool(hosts.lacking()), reason="this machine makes no network namespaces, or not for this user")
def test_a_host_has_a_loopback_of_its_own_and_is_gone_afterwards() -> None:
    with hosts.made(2) as (one, two):
        listening = one.do(lambda: socket.create_server(("127.0.0.1", 0)))
        address = listening.getsockname()
        with listening:
            one.do(lambda: socket.create_connection(address, timeout=5)).close()
            with pytest.raises(ConnectionRefusedError):
                two.do(lambda: socket.create_connection(address, timeout=5))
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, timeout=5)
        with socket.create_server((one.gateway, 0)) as server:
            one.do(lambda: socket.create_connection(server.getsockname(), timeout=5)).close()
    with pytest.raises(FileNotFoundError):
        one.do(lambda: None)
