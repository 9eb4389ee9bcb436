"""The schedule of faults depends on the seed alone, and contains every kind."""

from __future__ import annotations

from collections import Counter

from tests.faults.nemesis import schedule
from tests.faults.run import KINDS

SECONDS = 20.0


def test_the_same_seed_produces_the_same_faults() -> None:
    assert schedule(7, KINDS, SECONDS) == schedule(7, KINDS, SECONDS)
    assert schedule(7, KINDS, SECONDS) != schedule(8, KINDS, SECONDS)


def test_a_longer_run_begins_with_the_faults_of_a_shorter_one() -> None:
    for lane, faults in schedule(7, KINDS, SECONDS).items():
        assert schedule(7, KINDS, 2 * SECONDS)[lane][: len(faults) - 1] == faults[:-1]


def test_the_faults_of_a_lane_fill_most_of_the_time_and_end_within_it() -> None:
    for seed in range(1, 101):
        for faults in schedule(seed, KINDS, SECONDS).values():
            total_s = sum(fault.pause_s + fault.duration_s for fault in faults)
            assert 8 < total_s <= SECONDS


def test_a_hundred_seeds_contain_every_kind_at_least_thirty_times() -> None:
    counts = Counter(
        fault.kind.name
        for seed in range(1, 101)
        for faults in schedule(seed, KINDS, SECONDS).values()
        for fault in faults
    )
    assert all(counts[kind.name] >= 30 for kind in KINDS), counts
