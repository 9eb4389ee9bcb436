"""A postmaster that lives, and whether it has to be started anew."""

from __future__ import annotations

import pytest

from nexhb.cluster import SILENT_KNOCKS, STILL_KNOCKS, Answer, Knocks

HERE, STARTING, NONE = Answer.HERE, Answer.STARTING, Answer.NONE


@pytest.mark.parametrize(
    ("answers", "progress", "wedged"),
    [
        ([NONE] * SILENT_KNOCKS, "", True),
        ([NONE] * (SILENT_KNOCKS - 1), "", False),
        ([NONE, NONE, HERE, NONE, NONE, STARTING, NONE, NONE], "", False),
        ([STARTING] * (STILL_KNOCKS + 1), "same", True),
        ([STARTING] * (STILL_KNOCKS - 1), "same", False),
        ([STARTING] * 10 * STILL_KNOCKS, "moves", False),  # a recovery of an hour
        ([NONE] * SILENT_KNOCKS, "moves", True),  # nobody is told that it recovers
        ([*([STARTING] * (STILL_KNOCKS - 1)), HERE, STARTING, STARTING], "same", False),
        ([HERE] * 1_000, "same", False),
    ],
)
def test_it_is_started_anew_where_nobody_answers_or_nothing_moves(
    answers: list[Answer], progress: str, wedged: bool
) -> None:
    knocks = Knocks()
    found = [knocks.note(answer, (str(n) if progress == "moves" else progress,)) for n, answer in enumerate(answers)]
    assert found[-1] == wedged
    assert not any(found[:-1])
