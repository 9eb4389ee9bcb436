"""The schedule of faults: from the seed alone, and with every kind in it."""

from __future__ import annotations

from collections import Counter

from tests.faults.nemesis import schedule
from tests.faults.run import KINDS

SECONDS = 20.0


def test_the_same_seed_makes_the_same_faults() -> None:
    assert schedule(7, KINDS, SECONDS) == schedule(7, KINDS, SECONDS)
    assert schedule(7, KINDS, SECONDS) != schedule(8, KINDS, SECONDS)


def test_a_longer_run_begins_as_the_shorter_one() -> None:
    for lane, faults in schedule(7, KINDS, SECONDS).items():
        assert schedule(7, KINDS, 2 * SECONDS)[lane][: len(faults) - 1] == faults[:-1]


def test_a_lane_ends_in_time_and_is_never_idle_for_long() -> None:
    for seed in range(1, 101):
        for faults in schedule(seed, KINDS, SECONDS).values():
            took = sum(fault.pause_s + fault.lasts_s for fault in faults)
            assert 8 < took <= SECONDS


def test_a_hundred_seeds_meet_every_kind_many_times() -> None:
    met = Counter(
        fault.kind.name
        for seed in range(1, 101)
        for faults in schedule(seed, KINDS, SECONDS).values()
        for fault in faults
    )
    assert all(met[kind.name] >= 30 for kind in KINDS), met
