"""What wire.py packs is what PostgreSQL reads: it does the packing that asyncpg would do more slowly."""

from __future__ import annotations

import pytest

from nexhb import db, wire
from nexhb.db import Connection


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
async def test_a_packed_address_is_that_address(conn: Connection, said: str, stored: str) -> None:
    await db.use_packed_inet(conn)
    packed = wire.pack_ip(said)
    assert await conn.fetchval("SELECT host($1::inet)", packed) == stored
    assert await conn.fetchval("SELECT masklen($1::inet) = CASE family($1::inet) WHEN 4 THEN 32 ELSE 128 END", packed)
    assert await conn.fetchval("SELECT $1::text::inet", stored) == packed
