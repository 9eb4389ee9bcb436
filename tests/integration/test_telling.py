"""What is put into the outbox: from the incidents, what each route was told, silences and hours."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from nexhb.config import NotifySettings, RouteSettings, Settings
from nexhb.devices import registry
from nexhb.messages import own_incidents, silences, telling
from nexhb.messages.routes import routes_of
from nexhb.messages.silences import Silence
from nexhb.postgres.connections import Connection
from nexhb.readiness import Readiness
from tests.support.receiver import SECRET

pytestmark = pytest.mark.usefixtures("no_days")

MINUTE = timedelta(minutes=1)


@dataclass
class Teller:
    """A database with incidents, routes, and a clock that the test moves."""

    conn: Connection
    routes: list[RouteSettings] = field(default_factory=list)
    now: datetime = datetime(2026, 6, 1, 12, tzinfo=UTC)
    _seen: int = 0
    _teller: telling.Teller | None = None  # made in the first round; None as after a restart

    def route(self, name: str, /, **settings: Any) -> None:
        """Add a route."""
        values = {"name": name, "url": "https://hooks.example", "secret": SECRET} | settings
        self.routes.append(RouteSettings.model_validate(values))

    async def device(self, device_id: str, site: str | None = None, *tags: str) -> int:
        """Add a device."""
        if site:
            await self.conn.execute("INSERT INTO sites (site) VALUES ($1) ON CONFLICT DO NOTHING", site)
        await registry.add(self.conn, device_id, None)
        number: int = await self.conn.fetchval(
            "UPDATE devices SET site = $2, tags = $3 WHERE device_id = $1 RETURNING device_no", device_id, site, tags
        )
        return number

    async def open(self, *devices: int, kind: str = "offline", scope: str = "device", **columns: Any) -> int:
        """Open an incident of these devices."""
        severity = "critical" if scope != "device" else "warning" if kind == "offline" else "info"
        columns = {"severity": severity, "cause": "unknown"} | columns
        if scope == "device" and devices:
            columns |= {
                "device_no": devices[0],
                "site": await self.conn.fetchval("SELECT site FROM devices WHERE device_no = $1", devices[0]),
            }
        names = ", ".join(columns)
        places = ", ".join(f"${number}" for number in range(6, 6 + len(columns)))
        incident_id: int = await self.conn.fetchval(
            f"INSERT INTO incidents (kind, scope, since, opened_at, members, devices, {names}) "
            f"VALUES ($1, $2, $3, $4, $5, $5, {places}) RETURNING incident_id",
            kind, scope, self.now - 10 * MINUTE, self.now, len(devices), *columns.values(),
        )  # fmt: skip
        for device_no in devices:
            await self.conn.execute(
                "INSERT INTO incident_devices (incident_id, device_no, kind, joined_at) VALUES ($1, $2, $3, $4)",
                incident_id, device_no, f"{kind}{incident_id}", self.now,
            )  # fmt: skip
        return incident_id

    async def set(self, incident_id: int, **columns: Any) -> None:
        """Change an incident."""
        changes = ", ".join(f"{name} = ${number}" for number, name in enumerate(columns, 2))
        await self.conn.execute(
            f"UPDATE incidents SET {changes} WHERE incident_id = $1", incident_id, *columns.values()
        )

    async def resolve(self, *incident_ids: int) -> None:
        """Resolve incidents."""
        for incident_id in incident_ids:
            await self.set(incident_id, resolved_at=self.now)

    async def tell(self, minutes: float = 1) -> list[tuple[str, str, int]]:
        """Move the clock, run the end of a round, and return the new messages: route, kind, incident."""
        self.now += minutes * MINUTE
        if self._teller is None:
            self._teller = telling.Teller(routes_of(Settings(notify=NotifySettings(routes=self.routes))), Readiness())
        await self._teller.tell(self.conn, self.now)
        rows = await self.conn.fetch(
            "SELECT notification_no, route, kind, incident_id FROM notifications WHERE notification_no > $1 "
            "ORDER BY notification_no", self._seen,
        )  # fmt: skip
        self._seen = rows[-1]["notification_no"] if rows else self._seen
        return [(row["route"], row["kind"], row["incident_id"]) for row in rows]

    def restart(self) -> None:
        """Forget everything that is not in the database, and read the routes again."""
        self._teller = None

    async def silence(
        self, scope: str, value: str | None, minutes: float | None = None, hours: str | None = None
    ) -> int:
        """Add a silence from now on."""
        until = self.now + minutes * MINUTE if minutes else None
        silence = Silence(scope, value, self.now, until, hours, "UTC", "work", "Ada")
        number: int = (await silences.add(self.conn, silence, self.now))["silence_id"]
        return number


@pytest.fixture
def teller(conn: Connection) -> Teller:
    """A database without incidents, and no route."""
    return Teller(conn)


async def test_opening_and_end_are_told_once_and_a_repeated_round_tells_nothing(teller: Teller) -> None:
    teller.route("a")
    teller.route("b")
    one = await teller.open(await teller.device("kiosk-1", "store-42"))
    assert await teller.tell() == [("a", "opened", one), ("b", "opened", one)]
    assert await teller.tell() == []
    await teller.resolve(one)
    assert await teller.tell() == [("a", "resolved", one), ("b", "resolved", one)]
    assert await teller.tell() == []
    payload = await teller.conn.fetchval("SELECT payload FROM notifications ORDER BY notification_no LIMIT 1")
    assert orjson.loads(payload) | {"since": "", "opened_at": ""} == {
        "incident_id": one, "kind": "offline", "scope": "device", "severity": "warning", "site": "store-42",
        "site_name": None, "device_id": "kiosk-1", "device_name": None, "devices": 1, "members": 1, "cause": "unknown",
        "since": "", "opened_at": "", "resolved_at": None,
    }  # fmt: skip


async def test_an_incident_that_widens_is_told_again_and_what_it_absorbed_ends_silently(teller: Teller) -> None:
    teller.route("a")
    first, second = [await teller.device(name, "store-42") for name in ("k1", "k2")]
    one, two = await teller.open(first), await teller.open(second)
    assert await teller.tell() == [("a", "opened", one), ("a", "opened", two)]
    await teller.set(one, scope="site", device_no=None, severity="critical", members=2)
    await teller.set(two, absorbed_into=one, resolved_at=teller.now)
    assert await teller.tell() == [("a", "widened", one)]
    await teller.resolve(one)
    assert await teller.tell() == [("a", "resolved", one)]


async def test_a_route_that_was_told_of_an_absorbed_incident_hears_of_the_wider_one(teller: Teller) -> None:
    teller.route("tills", match={"tags": ["till"]})
    first, second = await teller.device("k1", "store-42"), await teller.device("k2", "store-42", "till")
    one, two = await teller.open(first), await teller.open(second)
    assert await teller.tell() == [("tills", "opened", two)]
    await teller.set(one, scope="site", device_no=None, severity="critical")
    await teller.conn.execute("UPDATE incident_devices SET incident_id = $1", one)
    await teller.set(two, absorbed_into=one, resolved_at=teller.now)
    assert await teller.tell() == [("tills", "widened", one)]
    await teller.resolve(one)
    assert await teller.tell() == [("tills", "resolved", one)]


async def test_what_goes_on_after_a_sites_incident_was_told_with_it(teller: Teller) -> None:
    teller.route("a")
    teller.route("critical", match={"severity": "critical"})
    numbers = [await teller.device(f"k{n}", "store-42") for n in range(3)]
    one = await teller.open(*numbers, scope="site", site="store-42")
    assert len(await teller.tell()) == 2
    await teller.resolve(one)
    rest = await teller.open(numbers[0], continues=one)
    assert await teller.tell() == [("a", "resolved", one), ("critical", "resolved", one)]
    await teller.resolve(rest)
    assert await teller.tell() == [("a", "resolved", rest), ("critical", "resolved", rest)]
    assert await teller.tell() == []


async def test_the_end_of_what_went_on_is_told_even_if_it_came_before_the_next_round(teller: Teller) -> None:
    teller.route("a")
    numbers = [await teller.device(f"k{n}", "store-42") for n in range(3)]
    one = await teller.open(*numbers, scope="site", site="store-42")
    assert len(await teller.tell()) == 1
    rest = await teller.open(numbers[0], continues=one)
    await teller.resolve(one, rest)
    assert await teller.tell() == [("a", "resolved", one), ("a", "resolved", rest)]
    assert await teller.tell() == []


async def test_flapping_replaces_an_outage_also_for_routes_that_do_not_hear_of_flapping(teller: Teller) -> None:
    teller.route("outages")
    teller.route("all", match={"kinds": ["offline", "flapping"]})
    number = await teller.device("k1")
    one = await teller.open(number)
    assert len(await teller.tell()) == 2
    flapping = await teller.open(number, kind="flapping")
    await teller.set(one, absorbed_into=flapping, resolved_at=teller.now)
    assert await teller.tell() == [("all", "opened", flapping)]
    await teller.resolve(flapping)
    assert await teller.tell() == [("outages", "resolved", flapping), ("all", "resolved", flapping)]


async def test_the_end_of_flapping_in_a_silence_is_told_to_routes_that_know_of_the_outage_before(
    teller: Teller,
) -> None:
    """A route that receives both kinds was told of the outage, and then of nothing: the flapping that had replaced the
    outage opened and ended during a silence."""
    teller.route("all", match={"kinds": ["offline", "flapping"]})
    number = await teller.device("k1")
    one = await teller.open(number)
    assert await teller.tell() == [("all", "opened", one)]
    await teller.silence("device", "k1", minutes=30)
    flapping = await teller.open(number, kind="flapping")
    await teller.set(one, absorbed_into=flapping, resolved_at=teller.now)
    assert await teller.tell() == []
    await teller.resolve(flapping)
    assert await teller.tell() == []
    assert await teller.tell(31) == [("all", "resolved", flapping)]
    assert await teller.tell() == []


async def test_a_quiet_end_is_not_told(teller: Teller) -> None:
    teller.route("a")
    one = await teller.open(await teller.device("k1"))
    assert len(await teller.tell()) == 1
    await teller.set(one, quiet=True, resolved_at=teller.now)
    assert await teller.tell() == []
    assert await teller.conn.fetchval("SELECT count(*) FROM incident_routes WHERE resolved_at IS NULL") == 0


async def test_reminders_end_with_an_acknowledgement(teller: Teller) -> None:
    teller.route("a", reminder_seconds=1800)
    one = await teller.open(await teller.device("k1"))
    assert len(await teller.tell()) == 1
    assert await teller.tell(29) == []
    assert await teller.tell(1) == [("a", "reminder", one)]
    assert await teller.tell(29) == []
    assert await teller.tell(1) == [("a", "reminder", one)]
    acked = await telling.acknowledge(teller.conn, one, teller.now, "Ada")
    assert acked is not None
    assert acked["acked_by"] == "Ada"
    assert await teller.tell(60) == []
    await teller.resolve(one)
    assert await teller.tell() == [("a", "resolved", one)]


@pytest.mark.parametrize(("scope", "value"), [("fleet", None), ("site", "s"), ("tag", "t"), ("device", "k1")])
async def test_what_opens_and_ends_in_a_silence_is_never_told(teller: Teller, scope: str, value: str | None) -> None:
    teller.route("a", match={"kinds": ["offline", "unity_down", "clock_wrong"]})
    number, other = await teller.device("k1", "s", "t"), await teller.device("k2")
    before = await teller.open(number, kind="unity_down")
    assert len(await teller.tell()) == 1
    await teller.silence(scope, value, 30)
    within, lasting, elsewhere = await teller.open(number), await teller.open(number, kind="clock_wrong"), None
    if scope != "fleet":
        elsewhere = await teller.open(other)
    assert await teller.tell() == ([("a", "opened", elsewhere)] if elsewhere else [])
    await teller.resolve(within, before)
    assert await teller.tell() == []
    assert await teller.tell(30) == [("a", "resolved", before), ("a", "opened", lasting)]


async def test_a_site_is_silenced_if_all_of_its_silent_devices_are(teller: Teller) -> None:
    teller.route("a")
    numbers = [await teller.device(f"k{n}", "store-42", "beta") for n in range(3)]
    await teller.silence("tag", "beta", 30)
    one = await teller.open(*numbers, scope="site", site="store-42")
    assert await teller.tell() == []
    await teller.conn.execute("UPDATE devices SET tags = '{}' WHERE device_id = 'k1'")
    assert await teller.tell() == [("a", "opened", one)]


async def test_a_silence_may_recur_and_be_removed(teller: Teller) -> None:
    teller.route("a")
    one = await teller.open(await teller.device("k1"))
    recurring = await teller.silence("fleet", None, hours="12:00-13:00")
    assert await teller.tell(59) == []
    assert await teller.tell(1) == [("a", "opened", one)]
    two = await teller.open(await teller.device("k2"))
    assert await teller.tell(23 * 60) == []
    assert await silences.remove(teller.conn, recurring)
    assert await teller.tell() == [("a", "opened", two)]


async def test_a_silence_whose_hours_cannot_be_read_silences_nothing(teller: Teller) -> None:
    teller.route("a")
    await teller.silence("fleet", None, hours="12:00-13:00")
    await teller.conn.execute("UPDATE silences SET hours = 'whenever'")
    one = await teller.open(await teller.device("k1"))
    assert await teller.tell() == [("a", "opened", one)]


async def test_quiet_hours_hold_back_one_route_only(teller: Teller) -> None:
    teller.route("day", quiet_hours="22:00-06:00", quiet_zone="Europe/Berlin")
    teller.route("night")
    teller.now = datetime(2026, 6, 1, 20, tzinfo=UTC)  # 22:00 in Berlin
    one = await teller.open(await teller.device("k1"))
    assert await teller.tell() == [("night", "opened", one)]
    assert await teller.tell(7 * 60 + 58) == []
    assert await teller.tell(2) == [("day", "opened", one)]


async def test_nothing_about_a_site_is_told_while_it_is_closed(teller: Teller) -> None:
    teller.route("a")
    number = await teller.device("k1", "store-42")
    await teller.conn.execute("UPDATE sites SET hours = '08:00-12:30'")
    one = await teller.open(number)
    assert await teller.tell() == [("a", "opened", one)]
    await teller.tell(60)
    await teller.resolve(one)
    two = await teller.open(number, kind="unity_down")
    assert await teller.tell() == []
    assert await teller.tell(19 * 60) == [("a", "resolved", one), ("a", "opened", two)]


async def test_a_route_that_was_removed_leaves_nothing_behind(teller: Teller) -> None:
    teller.route("a")
    one = await teller.open(await teller.device("k1"))
    assert len(await teller.tell()) == 1
    teller.routes.clear()
    teller.restart()
    await teller.resolve(one)
    assert await teller.tell() == []
    assert await teller.conn.fetchval("SELECT count(*) FROM incident_routes WHERE resolved_at IS NULL") == 0


async def test_more_incidents_than_a_page_are_all_told(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "PAGE", 3)
    teller.route("a")
    numbers = [await teller.open(await teller.device(f"k{n}")) for n in range(7)]
    assert await teller.tell() == [("a", "opened", number) for number in numbers]
    await teller.resolve(*numbers)
    assert len(await teller.tell()) == 7


async def test_troubles_of_nexhb_go_to_routes_with_self_whatever_is_silenced(teller: Teller) -> None:
    teller.route("own", self=True, match={"kinds": []})
    teller.route("other")
    await teller.silence("fleet", None, 30)
    run = "INSERT INTO job_runs (job, started_at, status, reason, host) VALUES ('nightly', $1, $2, $3, 'host')"
    await teller.conn.execute(run, teller.now, "failed", "disk full")
    for _ in range(2):
        await own_incidents.note(teller.conn, teller.now, "almost full")
    told = await teller.tell()
    assert [message[:2] for message in told] == [("own", "opened")] * 2
    payloads = [orjson.loads(row["payload"]) for row in await teller.conn.fetch("SELECT payload FROM notifications")]
    assert sorted((p["kind"], p["detail"]) for p in payloads) == [
        ("disk_low", "almost full"), ("nightly_failed", "disk full"),
    ]  # fmt: skip
    await own_incidents.note(teller.conn, teller.now, "")
    assert [message[:2] for message in await teller.tell()] == [("own", "resolved")]
    await teller.conn.execute(run, teller.now, "completed", None)
    await own_incidents.note(teller.conn, teller.now, "")
    assert [message[:2] for message in await teller.tell()] == [("own", "resolved")]
