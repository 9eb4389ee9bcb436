"""Attempts to break the archive: values that a CSV, a COPY or a reader of either may misinterpret."""

from __future__ import annotations

from collections import Counter

from nexhb import partitions
from nexhb.archive import catalog, get, restore
from tests.support.nightly import NOW, OLD, House

START = partitions.midnight(OLD)
TEXTS = [
    "\\N", "\\.", '"', '""', "'", ",", "a\n\\.\nb", "\\.\n", "\r", "\r\n", "\n", "a\rb", "\u2028", "\x85",
    "\x0b\x0c\x1c", " ", "\t", "NULL", "null", "\ufeff", "\ufeff\"a\"", "é", "e\u0301", "😀", "\x01", "\x7f", '",\n"',
    "=1+1", "x" * 100,
]  # fmt: skip


async def test_unusual_values_are_restored_unchanged(house: House) -> None:
    """The test stores each text as a device_id, an SSID and a version, temperatures that are not numbers, and times at
    the limits.

    It found no error. `archive get` finds each device by its id, whatever characters the id has.
    """
    await partitions.ensure(house.conn, [OLD])
    await house.conn.executemany("INSERT INTO devices (device_id) VALUES ($1)", [(text,) for text in TEXTS])
    await house.conn.executemany(
        """INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
           VALUES ($1, $1, '', $1)""",
        [(text,) for text in ["", *TEXTS]],
    )
    await house.conn.execute(
        """
        INSERT INTO device_heartbeats
        SELECT $1::timestamptz + o, $1::timestamptz - o, d.device_no, extract(epoch FROM $1 + o)::bigint - 1577836800,
               l.label_no, i, i, t, -32768, 32767, NULL, true, false, a
        FROM devices d,
             unnest('{NaN,Infinity,-Infinity,-0,1e-45,3.4028235e38,0.1,16777217,NULL}'::real[],
                    '{2147483647,-2147483648,0,1,2,3,4,5,NULL}'::int[],
                    '{10.0.0.1,10.0.0.1/8,::1,fe80::1/64,::ffff:1.2.3.4,0.0.0.0/0,::/0,255.255.255.255,NULL}'::inet[],
                    '{0 s,1 us,1 s,1 m,1 h,12 h,23:59:59.999999,5 s,6 s}'::interval[]) AS v (t, i, a, o)
        JOIN LATERAL (SELECT label_no FROM heartbeat_labels ORDER BY (label_no * 7 + i::bigint) % 31 LIMIT 1) l ON true
        ON CONFLICT DO NOTHING""",
        START,
    )
    # These rows refer to a device and labels that do not exist.
    await house.conn.execute(
        """INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong)
           VALUES ($1, $1, 999999, 1, 999999, false), ($1, $1, 1, 7, 999999, true)""",
        START,
    )
    rows = "SELECT to_jsonb(h) - 'label_no' FROM device_heartbeats h ORDER BY device_no, bucket"
    spelled = (
        "SELECT to_jsonb(h) FROM heartbeat_history h WHERE (device_no, bucket) <> (1, 7) ORDER BY device_no, bucket"
    )
    before, history = await house.conn.fetch(rows), await house.conn.fetch(spelled)
    beats = Counter(row["device_id"] for row in await house.rows(OLD))
    assert len(before) > len(TEXTS) * 7
    run = await house.nightly()
    assert (run.status, run.reason) == ("completed", "")
    assert run.counts["drilled"] == 1
    archives = await catalog.find(house.conn, OLD)
    for text in TEXTS:
        found = await get.heartbeats_of(house.store, archives, text)
        assert len(found) == beats[text]
    await restore.restore_day(house.conn, house.store, archives, NOW)
    assert await house.conn.fetch(rows) == before
    assert await house.conn.fetch(spelled) == history
