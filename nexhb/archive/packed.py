"""Unpack a row of an archive into the columns of a heartbeat, as texts. Pure.

This does the same as `unpack` in sql/queries/archive.sql, for reading an archive without restoring it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from nexhb.archive.manifest import COLUMNS
from nexhb.heartbeat import BUCKET_EPOCH

_SECOND = timedelta(seconds=1)


def unpack(texts: Sequence[str], columns: Sequence[str], bucket_seconds: int) -> list[str]:
    """Convert the texts of a format's columns to the texts of COLUMNS; a column that the format lacks is empty. Raises
    ValueError for an invalid row. `bucket_seconds` is not used for a row of the first format."""
    row = dict(zip(columns, texts, strict=True))
    if row.get("received_after_us"):  # the row is packed; otherwise its columns are stored as they are
        ts = datetime.fromisoformat(row["ts"])
        row["received_at"] = _text(ts + timedelta(microseconds=int(row["received_after_us"])))
        second = ts.replace(microsecond=0)
        if row["up_since"]:
            row["uptime_s"] = str((second - datetime.fromisoformat(row["up_since"])) // _SECOND)
        if not row["bucket"]:
            since = round(second.timestamp()) - BUCKET_EPOCH
            row["bucket"] = str(since - since % bucket_seconds)
    return [row.get(column, "") for column in COLUMNS]


def _text(moment: datetime) -> str:
    """Format a time as PostgreSQL does."""
    text = moment.replace(tzinfo=None).isoformat(" ")
    return (text.rstrip("0") if moment.microsecond else text) + "+00"
