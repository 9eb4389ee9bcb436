"""`unknown_labels` returns the labels of a batch that have no number yet."""

from __future__ import annotations

from nexhb.heartbeat import Label
from nexhb.ingest.labels import unknown_labels
from tests.support.heartbeats import LABEL


def test_unknown_labels_are_returned_once_and_sorted() -> None:
    labels = [Label("2", "", "", ""), LABEL, Label("1", "", "", "b"), Label("1", "", "", "a")]
    unknown = unknown_labels([*labels, *labels], {LABEL: 1})
    assert unknown == [Label("1", "", "", "a"), Label("1", "", "", "b"), Label("2", "", "", "")]
