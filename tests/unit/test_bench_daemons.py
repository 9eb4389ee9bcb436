"""What is said of several daemons: verdicts, tables, the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.compare.command import PAGE
from bench.compare.page import NOT_QUIET, between
from bench.daemons.found import BEGIN, END, Copies, Found, Round, section, verdicts

ONE = Round("1 on one host", 1, 16_000, 20.0, 0.9, 0.3, 0.2, 0.02, 0)
TWO = ONE._replace(name="2 on one host", daemons=2, rate_per_s=20_000, staged=3)
FOUND = Found(
    rounds=(ONE, TWO),
    copies=Copies(3, 1_000, 3_000, 1_000, 40),
    jobs={"completed": 1, "skipped": 2},
    reasons=("lock_held", "lock_held"),
    checks={"one host": (0, 0)},
    lacking=0,
    no_hosts="",
)


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        (replace(FOUND, lacking=1), "requests not acknowledged"),
        (replace(FOUND, checks={"one host": (0, 0), "several hosts": (1, 0)}), "acknowledged and not in the database"),
        (replace(FOUND, checks={"one host": (0, 1)}), "in the database twice, or never sent"),
        (replace(FOUND, copies=Copies(3, 1_000, 2_999, 1_000, 0)), "copies of a heartbeat not acknowledged"),
        (replace(FOUND, copies=Copies(3, 1_000, 3_000, 1_001, 0)), "heartbeats of the copies not written exactly once"),
        (replace(FOUND, copies=Copies(3, 1_000, 3_000, 999, 0)), "heartbeats of the copies not written exactly once"),
        (replace(FOUND, jobs={"skipped": 3}), "daemons that ran the job, at least"),
        (replace(FOUND, jobs={"completed": 2, "skipped": 1}), "daemons that ran the job"),
        (replace(FOUND, jobs={"completed": 1, "skipped": 1, "failed": 1}), "daemons whose job failed"),
        (
            replace(FOUND, reasons=("lock_held", "already_ran")),
            "daemons that skipped it for another reason than lock_held",
        ),
    ],
)
def test_one_floor_is_broken_alone(worse: Found, name: str) -> None:
    assert all(verdict.ok for verdict in verdicts(FOUND))
    assert [verdict.name for verdict in verdicts(worse) if not verdict.ok] == [name]


def test_the_section_compares_each_round_with_the_first() -> None:
    text = section(FOUND, verdicts(FOUND), "today on this")
    assert "| 2 on one host | 20,000 | 1.25 | 20 | 0.90 | 0.30 | 0.20 | 0.02 | 3 |" in text
    assert "1,000 heartbeats were sent to 3 daemons at once: 3,000 answers of 200, 1,000 rows" in text
    assert "1 completed, 2 skipped (lock_held)" in text
    assert "`make bench-daemons` writes this section. Measured today on this. " in text
    assert NOT_QUIET not in text
    busy = replace(FOUND, rounds=(ONE._replace(others_cores=0.5),), no_hosts="only root makes network namespaces")
    assert NOT_QUIET in section(busy, (), "")
    assert "not tried: only root makes network namespaces" in section(busy, (), "")


def test_the_page_that_is_kept_has_its_markers() -> None:
    between(PAGE.read_text(encoding="utf-8"), "", BEGIN, END)
