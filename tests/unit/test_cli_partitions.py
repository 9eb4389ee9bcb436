"""`nexhb partitions` prints how old the row counts are."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from nexhb import cli
from nexhb.cli import partitions


def day(number: int, counted_at: datetime | None) -> dict[str, object]:
    """A row of hb_partitions."""
    return {
        "range_start": datetime(2026, 11, number, tzinfo=UTC), "state": "active", "reason": None, "present": True,
        "attached": True, "row_count": None if counted_at is None else 5, "bytes_size": 2**20, "restored_at": None,
        "counted_at": counted_at,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        ([None, datetime(2026, 11, 28, 3, 1, tzinfo=UTC), datetime(2026, 11, 20, 3, tzinfo=UTC)], "2026-11-28 03:01Z;"),
        ([None], "has not counted any yet"),
    ],
)
def test_the_list_shows_when_the_rows_were_counted(
    counted: list[datetime | None],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(asked: object) -> list[dict[str, object]]:
        asked.close()  # type: ignore[attr-defined]  # a coroutine; no database is asked
        return [day(29 - ago, at) for ago, at in enumerate(counted)]

    monkeypatch.setattr(cli, "run", run)
    partitions.partitions()
    lines = capsys.readouterr().out.splitlines()
    assert "2026-11-29" in "".join(lines)
    assert expected in lines[-1]
