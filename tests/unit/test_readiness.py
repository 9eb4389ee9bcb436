"""Readiness: which reasons are reported, which refuse heartbeats, and the gauge."""

from __future__ import annotations

import pytest

from nexhb import metrics
from nexhb.readiness import PREVENTING, REFUSING, Readiness, Source


def gauge() -> float:
    """Return the value of nexhb_ready."""
    [family] = metrics.ready.collect()
    return family.samples[0].value


@pytest.mark.parametrize("source", list(Source))
def test_every_source_makes_the_daemon_not_ready_until_it_is_cleared(source: Source) -> None:
    readiness = Readiness()
    assert (readiness.is_ready, gauge()) == (True, 1)
    readiness.block(source, "It is broken.")
    assert (readiness.reasons(), readiness.is_ready, gauge()) == (["It is broken."], False, 0)
    assert readiness.refusal == ("It is broken." if source in REFUSING else "")
    assert readiness.can_commit == (source not in PREVENTING)
    readiness.clear(source)
    readiness.clear(source)
    assert (readiness.reasons(), readiness.is_ready, readiness.refusal, gauge()) == ([], True, "", 1)


def test_a_recovered_database_does_not_hide_a_full_disk() -> None:
    """Formerly, the writer set the gauge to 1 when the database was available again, even if another reason
    remained."""
    readiness = Readiness()
    readiness.block(Source.DISK, "The disk is full.")
    readiness.block(Source.DATABASE, "The database cannot commit: the server shuts down.", "57P01: admin shutdown")
    assert readiness.refusal == "The database cannot commit: the server shuts down."
    assert readiness.reasons() == ["The disk is full.", readiness.refusal]
    assert readiness.reasons(in_full=True) == ["The disk is full.", "57P01: admin shutdown"]
    readiness.clear(Source.DATABASE)
    assert (readiness.refusal, gauge()) == ("The disk is full.", 0)


def test_an_empty_reason_clears_the_source() -> None:
    readiness = Readiness()
    readiness.set(Source.CLOCK, "The clocks differ.")
    readiness.set(Source.CLOCK, "")
    assert readiness.is_ready
