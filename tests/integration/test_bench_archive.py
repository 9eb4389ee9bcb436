"""The archive scenario, small, but the whole way: two days filled, archived under load and alone, read back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.runs import archive
from bench.scenarios import ARCHIVE


def test_two_days_are_archived_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a machine without the programs
    monkeypatch.setattr("bench.yardstick.shutil.which", lambda _: None)
    small = replace(ARCHIVE, devices=20, beats=24, interval_s=0.1, jitter_s=0, before_s=2, after_s=0, most_s=30)
    finding = archive.run(small)
    verdicts = {verdict.name: verdict for verdict in finding.verdicts}
    # so small a day says nothing of time, nor of what a row of a large one takes
    of_large_days = {small.ratio.name, small.p99.name, archive.WHOLE_NIGHT, archive.BYTES.name}
    broken = {name for name, verdict in verdicts.items() if not verdict.ok} - of_large_days
    assert not broken
    details: dict[str, Any] = dict(finding.details)
    assert details["rows_archived"] == 2 * 20 * 24
    assert details["pipe"] == "psql | python (zstd) 9 17 6 | sha256sum"
    assert details["check"]["ok"]
    assert 10 < details["bytes_per_row"] < details["stream_bytes_per_row"] < 250
    assert {"archived": 1, "dropped": 1, "drilled": 1}.items() <= details["nightly"]["alone"].items()
