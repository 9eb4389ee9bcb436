"""A fleet in a database whose devices change their state."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from nexhb.heartbeat import CONTENT
from nexhb.postgres import sql

# The statements with the fields of Watch that they take. The devices that send are in the tables already. One of a
# hundred has been silent for an hour; the others count as heard in an hour, so that only those fall silent which a run
# makes silent.
FILL: Final = (
    (
        "INSERT INTO sites (site) SELECT 'store-' || n FROM generate_series(0, $1::int / $2::int) n",
        ("devices", "per_site"),
    ),
    (
        """
        INSERT INTO devices (device_id, alias, facts_ts, site)
        SELECT gen_random_uuid()::text, 'kiosk ' || n % $2::int, now(), 'store-' || n / $2::int
        FROM generate_series((SELECT count(*) FROM devices) + 1, $1::int) n
        """,
        ("devices", "per_site"),
    ),
    (
        """
        INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, battery_pct, plugged, temp_c,
            network_type, ssid, ip, uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version, alias,
            heard_at)
        SELECT d.device_no, d.device_id, t.ts, t.ts, 20 + d.device_no % 80, d.device_no % 3 = 0, 26 + d.device_no % 9,
               'wifi', d.site, '192.168.0.0'::inet + d.device_no % 65536, 100000 + d.device_no,
               1000 + d.device_no % 900, '2.1.0', true, '1.0.9', d.alias,
               t.ts + CASE WHEN hashint4(d.device_no) % 100 = 0 THEN interval '0' ELSE interval '2 hours' END
        FROM devices d, LATERAL (SELECT now() - interval '1 hour' AS ts) t
        WHERE d.device_no > $1 ORDER BY d.device_no
        """,
        ("senders",),
    ),
    ("VACUUM (ANALYZE) sites, devices, device_last_status", ()),
)
# The devices of which nothing was changed so far, in a random order.
CHOOSE: Final = """
SELECT device_no FROM device_last_status WHERE heard_at > now() + interval '10 minutes' ORDER BY hashint4(device_no + 1)
LIMIT $1
"""
_SILENCE: Final = (
    "UPDATE device_last_status SET heard_at = now() - make_interval(secs => 601) WHERE device_no = ANY($1::int[])"
)
_STATUS: Final = f"""
SELECT device_no, device_id, now(), now(), clock_wrong, now(), sections, said_facts,
       {", ".join("false" if column.name == "unity_running" else column.name for column in CONTENT)}
FROM device_last_status WHERE device_no = ANY($1::int[]) ORDER BY device_no
"""


@dataclass
class Fleet:
    """The devices whose state a run changes: half of them stop Unity, half fall silent."""

    conn: Any
    unchanged: list[int]
    noteworthy: tuple[int, timedelta] = field(default=(20, timedelta(minutes=10)))

    async def change(self, number: int) -> None:
        """Change the state of `number` more devices; heartbeats by the writer's own statement."""
        if not number:
            return
        stopped, silent = self.unchanged[: number // 2], self.unchanged[number // 2 : number]
        del self.unchanged[:number]
        await self.conn.execute(_SILENCE, silent)
        rows = await self.conn.fetch(_STATUS, stopped)
        columns = map(list, zip(*rows, strict=True))
        await self.conn.fetchrow(sql.queries("writer")["upsert_last_status"], [], [], [], *self.noteworthy, *columns)
