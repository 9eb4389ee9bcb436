"""PostgreSQL reads the values that wire.py packs. wire.py packs them itself since asyncpg would do so more slowly."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from nexhb.postgres import connections
from nexhb.postgres.codecs import pack_ip, pack_moment
from nexhb.postgres.connections import Connection


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ("192.168.1.50", "192.168.1.50"),
        ("0.0.0.0", "0.0.0.0"),  # noqa: S104 - an address to be stored
        ("255.255.255.255", "255.255.255.255"),
        ("2001:0DB8:0:0::A", "2001:db8::a"),
        ("::", "::"),
        ("fe80::1%wlan0", "fe80::1"),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.1"),
    ],
)
async def test_a_packed_address_is_unpacked_by_postgresql_unchanged(conn: Connection, said: str, stored: str) -> None:
    await connections.use_packed(conn)
    packed = pack_ip(said)
    assert await conn.fetchval("SELECT host($1::inet)", packed) == stored
    assert await conn.fetchval("SELECT masklen($1::inet) = CASE family($1::inet) WHEN 4 THEN 32 ELSE 128 END", packed)
    assert await conn.fetchval("SELECT $1::text::inet", stored) == packed


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2026, 11, 24, 2, 0, 0, 123_456, tzinfo=UTC),
        datetime(2026, 11, 24, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2000, 1, 1, tzinfo=UTC),
        datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2, 1, 1, tzinfo=UTC),
        datetime(9998, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2026, 11, 24, 2, tzinfo=timezone(timedelta(hours=5, minutes=45))),
    ],
)
async def test_a_packed_time_is_unpacked_by_postgresql_unchanged(conn: Connection, moment: datetime) -> None:
    expected = await conn.fetchval("SELECT extract(epoch FROM $1::timestamptz)", moment)
    await connections.use_packed(conn)
    for value in (moment, pack_moment(moment)):
        assert await conn.fetchval("SELECT extract(epoch FROM $1::timestamptz)", value) == expected
        assert await conn.fetchval("SELECT $1::timestamptz", value) == moment
    assert await conn.fetchval("SELECT ($1::timestamptz[])[1]", [pack_moment(moment)]) == moment
