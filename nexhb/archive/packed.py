"""An archive's row → the heartbeat as people read it, text by text. Pure.

The same as `unpack` in sql/queries/archive.sql, for those who read an archive without restoring it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from nexhb.archive.manifest import COLUMNS, PACKED
from nexhb.wire import BUCKET_EPOCH

_SECOND = timedelta(seconds=1)


def unpacked(texts: Sequence[str], bucket_seconds: int) -> list[str]:
    """The texts of PACKED as those of COLUMNS. Raises ValueError for what no archive holds."""
    row = dict(zip(PACKED, texts, strict=True))
    if row["received_after_us"]:  # else all is spelled out
        ts = datetime.fromisoformat(row["ts"])
        row["received_at"] = _text(ts + timedelta(microseconds=int(row["received_after_us"])))
        second = ts.replace(microsecond=0)
        if row["up_since"]:
            row["uptime_s"] = str((second - datetime.fromisoformat(row["up_since"])) // _SECOND)
        if not row["bucket"]:
            since = round(second.timestamp()) - BUCKET_EPOCH
            row["bucket"] = str(since - since % bucket_seconds)
    return [row[column] for column in COLUMNS]


def _text(moment: datetime) -> str:
    """As PostgreSQL writes it."""
    text = moment.replace(tzinfo=None).isoformat(" ")
    return (text.rstrip("0") if moment.microsecond else text) + "+00"
