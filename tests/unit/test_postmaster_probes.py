"""When a postmaster that is alive must be restarted."""

from __future__ import annotations

import pytest

from nexhb.postgres.cluster import MAX_SILENT_PROBES, MAX_STALLED_PROBES, PostmasterProbes, ProbeResult

ACCEPTS, STARTING, SILENT = ProbeResult.ACCEPTS, ProbeResult.STARTING, ProbeResult.SILENT


@pytest.mark.parametrize(
    ("results", "progress", "stuck"),
    [
        ([SILENT] * MAX_SILENT_PROBES, "", True),
        ([SILENT] * (MAX_SILENT_PROBES - 1), "", False),
        ([SILENT, SILENT, ACCEPTS, SILENT, SILENT, STARTING, SILENT, SILENT], "", False),
        ([STARTING] * (MAX_STALLED_PROBES + 1), "same", True),
        ([STARTING] * (MAX_STALLED_PROBES - 1), "same", False),
        ([STARTING] * 10 * MAX_STALLED_PROBES, "moves", False),  # a recovery that takes an hour but makes progress
        ([SILENT] * MAX_SILENT_PROBES, "moves", True),  # silence counts even during a recovery
        ([*([STARTING] * (MAX_STALLED_PROBES - 1)), ACCEPTS, STARTING, STARTING], "same", False),
        ([ACCEPTS] * 1_000, "same", False),
    ],
)
def test_a_postmaster_is_restarted_if_it_does_not_answer_or_makes_no_progress(
    results: list[ProbeResult], progress: str, stuck: bool
) -> None:
    probes = PostmasterProbes()
    found = [
        probes.is_stuck(result, (str(n) if progress == "moves" else progress,)) for n, result in enumerate(results)
    ]
    assert found[-1] == stuck
    assert not any(found[:-1])
