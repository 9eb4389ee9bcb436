"""The columns listed in nexhb/heartbeat.py are the fields of a heartbeat, and the columns of every table that stores
heartbeats."""

from __future__ import annotations

import msgspec
import pytest

from nexhb.archive.manifest import COLUMNS
from nexhb.heartbeat import CONTENT, FACTS, HISTORY_COLUMNS, MEASURED, Column, DeviceFacts, Heartbeat, Label
from nexhb.postgres.connections import Connection


async def columns_of(conn: Connection, table: str) -> dict[str, str]:
    """Return the types of the columns of a table or view by name."""
    rows = await conn.fetch(
        """SELECT attname, format_type(atttypid, atttypmod) AS type FROM pg_attribute
           WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped""",
        table,
    )
    return {row["attname"]: row["type"] for row in rows}


def typed(*columns: Column) -> dict[str, str]:
    """Return the types of these columns by name."""
    return {column.name: column.type for column in columns}


ROW = ("ts", "received_at", "device_no", "bucket", "label_no", "clock_wrong")
OTHERS = {
    "device_heartbeats": ROW,
    "late_heartbeats": (*ROW, "reason"),
    "heartbeat_labels": ("label_no", "sections"),
    "heartbeat_history": ("device_id", "ts", "received_at", "clock_wrong", "device_no", "bucket"),
    "device_last_status": (
        "device_no", "device_id", "last_ts", "received_at", "clock_wrong", "status", "alias", "heard_at", "heard_slot",
        "sections", "said_facts", "kept_facts", "name", "changes",
    ),
    "devices": (
        "device_no", "device_id", "facts_ts", "created_at", "revoked_at", "rotated", "name", "nexmdm_name",
        "site", "tags",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("device_heartbeats", MEASURED),
        ("late_heartbeats", MEASURED),
        ("heartbeat_labels", [column for column in CONTENT if column.in_label]),
        ("heartbeat_history", CONTENT),
        ("device_last_status", CONTENT),
        ("devices", FACTS),
    ],
)
async def test_a_table_has_the_columns_with_their_types(conn: Connection, table: str, columns: list[Column]) -> None:
    actual = await columns_of(conn, table)
    assert {name: type_ for name, type_ in actual.items() if name not in OTHERS[table]} == typed(*columns)
    assert set(OTHERS[table]) <= actual.keys()


async def test_history_columns_and_the_archives_name_every_column_of_their_table(conn: Connection) -> None:
    assert sorted(HISTORY_COLUMNS) == sorted(await columns_of(conn, "device_heartbeats"))
    assert sorted(COLUMNS) == sorted(await columns_of(conn, "heartbeat_history"))


def test_each_column_is_an_attribute_of_a_heartbeat_or_of_its_label() -> None:
    attributes = {field.name for field in msgspec.structs.fields(Heartbeat)}
    assert {column.name for column in MEASURED} <= attributes
    assert {column.name for column in CONTENT} - attributes == {*Label._fields} - {"sections"}
    assert tuple(column.name for column in FACTS) == DeviceFacts._fields
