"""What operators ask: right at the edges, paged by key, closed to everybody without the key."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from nexhb import devices, partitions
from nexhb.config import Database as DatabaseSettings
from nexhb.config import Ingest
from nexhb.db import Connection, Database
from nexhb.http.app import ROUTES, Route
from tests.conftest import ADMIN_KEY, Agent, Nexhb, StartDaemon, shown

ADMIN_ROUTES = [
    ("GET", "/v1/fleet"), ("GET", "/v1/devices"), ("GET", "/v1/devices/offline"), ("GET", "/v1/devices/unity-down"),
    ("GET", "/v1/devices/x"), ("GET", "/v1/devices/x/heartbeats"), ("GET", "/metrics"), ("POST", "/ops/enrolment-keys"),
]  # fmt: skip


async def test_the_fleet_is_counted_and_listed(nexhb: Nexhb, now: datetime) -> None:
    online, offline, down, never, revoked = [await nexhb.agent(name) for name in ("on", "off", "down", "never", "rev")]
    await online.send(now)
    await offline.live(now - timedelta(minutes=11))
    await down.send(now, unity_process_running=False)
    await revoked.live(now - timedelta(hours=2), unity_process_running=False)
    conn = await nexhb.database.connect(application="test")
    await devices.revoke(conn, "rev", now)
    await conn.close()
    fleet = await nexhb.get("/v1/fleet")
    assert {key: fleet[key] for key in ("devices", "online", "offline", "unity_down", "never_seen")} == {
        "devices": 4, "online": 2, "offline": 1, "unity_down": 1, "never_seen": 1,
    }  # fmt: skip
    found = await nexhb.get("/v1/devices/offline")
    assert (found["count"], found["source"]) == (1, "last_status")
    [row] = found["devices"]
    assert (row["device_id"], row["alias"], row["last_ts"]) == (
        offline.device_id, "Store 42 - kiosk 3", shown(now - timedelta(minutes=11)),
    )  # fmt: skip
    assert 660 <= row["offline_seconds"] <= 660 + 60
    assert [row["device_id"] for row in (await nexhb.get("/v1/devices/unity-down"))["devices"]] == [down.device_id]
    statuses = {row["device_id"]: row["status"] for row in (await nexhb.get("/v1/devices"))["devices"]}
    assert statuses == {"on": "ok", "off": "ok", "down": "ok", "never": "never_seen", "rev": "revoked"}
    assert never.device_id in statuses


@pytest.mark.parametrize("micros", [0, 120_000, 123_456])
async def test_moments_are_read_as_they_were_written_whatever_the_databases_defaults(
    start_daemon: StartDaemon, conn: Connection, now: datetime, micros: int
) -> None:
    name = await conn.fetchval("SELECT current_database()")
    await conn.execute(
        f"ALTER DATABASE {name} SET datestyle = 'German'; ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'"
    )
    nexhb = await start_daemon()
    made = now.replace(microsecond=micros) - timedelta(hours=1)
    await (await nexhb.agent("kiosk-1")).live(made)
    for path in ("/v1/devices/offline", "/v1/devices"):
        [row] = (await nexhb.get(path))["devices"]
        assert row["last_ts"] == shown(made)
    assert (await nexhb.get("/v1/devices/kiosk-1"))["last_ts"] == shown(made)
    start, end = shown(made), shown(made + timedelta(microseconds=1))
    [beat] = (await nexhb.get(f"/v1/devices/kiosk-1/heartbeats?from={start}&to={end}"))["heartbeats"]
    assert beat["ts"] == shown(made)


async def test_offline_is_right_to_the_second(start_daemon: StartDaemon) -> None:
    noon = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(minutes=1)
    nexhb = await start_daemon(now=noon)
    made = {f"s{seconds}": noon - timedelta(seconds=seconds) for seconds in (0, 299, 300, 301, 599, 600, 601, 3600)}
    for name, moment in made.items():
        await (await nexhb.agent(name)).live(moment)
    found = await nexhb.get("/v1/devices/offline?minutes=10")
    assert [row["device_id"] for row in found["devices"]] == ["s3600", "s601"]
    assert [row["offline_seconds"] for row in found["devices"]] == [3600, 601]
    assert (await nexhb.get("/v1/devices/offline?minutes=5"))["count"] == 5
    assert (await nexhb.get("/v1/devices/offline?minutes=5&limit=1"))["count"] == 5
    fleet = await nexhb.get("/v1/fleet")
    assert (fleet["online"], fleet["offline"]) == (6, 2)


async def test_a_list_has_its_order_whole_or_cut_and_from_either_source(start_daemon: StartDaemon) -> None:
    """Some of one slot, some of one moment, and sent in none of the orders."""
    noon = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(minutes=1)
    nexhb = await start_daemon(now=noon)
    minutes = {"b": 61, "e": 20, "a": 61, "d": 62, "c": 300, "f": 21}
    for name, ago in minutes.items():
        await (await nexhb.agent(name)).live(noon - timedelta(minutes=ago), unity_process_running=False)
    orders = {"offline": ["c", "d", "a", "b", "f", "e"], "unity-down": ["e", "f", "b", "a", "d", "c"]}
    for source in ("last_status", "legacy"):
        wanted = {"read_from_last_status": source == "last_status"}
        async with nexhb.http.put(f"{nexhb.url}/ops/flags", json=wanted, headers={"x-admin": ADMIN_KEY}) as response:
            assert response.status == 200
        for which, order in orders.items():
            for limit in (1, 4, 6, 7):
                found = await nexhb.get(f"/v1/devices/{which}?limit={limit}")
                assert (found["source"], found["count"]) == (source, 6)
                assert [row["device_id"] for row in found["devices"]] == order[:limit]
                seen = [row["device_id"] for row in found["devices"]]
                while found["next"] is not None:
                    found = await nexhb.get(f"/v1/devices/{which}?limit={limit}&after={quote(found['next'])}")
                    assert found["count"] == 6, "all of them, not those that are left"
                    seen += [row["device_id"] for row in found["devices"]]
                assert seen == order
            for wrong in ("a", "2026-11-24T02:00:00Z", "2026-11-24T02:00:00/a", "x/a", "0001-01-01T00:00:00Z/a"):
                problem = await nexhb.get(f"/v1/devices/{which}?after={quote(wrong)}", 400)
                assert problem["errors"][0]["path"] == "after"


async def test_unity_down_counts_only_what_was_seen_within_a_day(nexhb: Nexhb, now: datetime) -> None:
    old, fresh, unknown = [await nexhb.agent() for _ in range(3)]
    await old.live(now - timedelta(hours=25), unity_process_running=False)
    await fresh.live(now - timedelta(hours=23), unity_process_running=False)
    await unknown.send(now, unity_process_running=None, monitored_foreground_recent_s=-1)
    found = await nexhb.get("/v1/devices/unity-down")
    assert [row["device_id"] for row in found["devices"]] == [fresh.device_id]


async def test_pages_by_key_show_each_device_once_also_while_some_arrive(nexhb: Nexhb, conn: Connection) -> None:
    for number in range(25):
        await devices.add(conn, f"d{number:02}", None)
    seen: list[str] = []
    page = await nexhb.get("/v1/devices?limit=10")
    while True:
        seen += [row["device_id"] for row in page["devices"]]
        await devices.add(conn, f"a{len(seen)}", None)  # behind the reader
        if page["next"] is None:
            break
        page = await nexhb.get(f"/v1/devices?limit=10&after={page['next']}")
    assert seen == [f"d{number:02}" for number in range(25)]


async def test_a_history_goes_on_page_by_page_and_says_when_it_ends(nexhb: Nexhb, now: datetime) -> None:
    """It ended at `limit`, and did not say that there was more."""
    agent = await nexhb.agent("kiosk-1")
    noon = now.replace(minute=0, second=0, microsecond=0)
    made = [noon - timedelta(seconds=10 * n) for n in range(1, 6)] + [noon - timedelta(days=n) for n in range(1, 4)]
    for moment in made:
        assert (await agent.send(moment)).status == 200
    path = f"/v1/devices/kiosk-1/heartbeats?from={noon - timedelta(days=6):%Y-%m-%dT%H:%M:%SZ}"
    for limit in (1, 3, 7, 8, 9):
        seen, pages = [], 0
        page = await nexhb.get(f"{path}&limit={limit}")
        while True:
            seen += [beat["ts"] for beat in page["heartbeats"]]
            pages += 1
            assert "bucket" not in page["heartbeats"][0]
            if page["next"] is None:
                break
            await agent.send(now + timedelta(seconds=10 * pages))  # before the reader
            page = await nexhb.get(f"{path}&limit={limit}&after={page['next']}")
        assert [ts for ts in seen if ts < shown(noon)] == [shown(moment) for moment in made]
        assert len(seen) == len(set(seen))
    assert (await nexhb.get(f"{path}&limit=8&after=0"))["heartbeats"] == []


async def test_a_page_of_an_old_history_opens_no_newer_day(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """Ninety days of partitions would be opened for each page, of which all but the last have nothing."""
    agent = await nexhb.agent("kiosk-1")
    for days in (0, 3, 4):
        assert (await agent.send(now - timedelta(days=days))).status == 200
    path = f"/v1/devices/kiosk-1/heartbeats?from={now - timedelta(days=6):%Y-%m-%dT%H:%M:%SZ}&limit=1"
    page = await nexhb.get(path)
    page = await nexhb.get(f"{path}&after={page['next']}")
    async with conn.transaction():
        await conn.execute(f"LOCK TABLE {partitions.name_of(now.date())} IN ACCESS EXCLUSIVE MODE")
        page = await nexhb.get(f"{path}&after={page['next']}")
    assert [beat["ts"] for beat in page["heartbeats"]] == [shown(now - timedelta(days=4))]


async def test_a_history_goes_on_where_the_buckets_grew(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    """With other ingest.bucket_seconds since, the order of the buckets is not that of ts for a moment."""
    hour = now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
    token = await devices.add(conn, "kiosk-1", None)
    for bucket_seconds, seconds in ((10, 35), (60, 90), (3600, 1800)):
        nexhb = await start_daemon(ingest=Ingest(bucket_seconds=bucket_seconds))
        assert (await Agent(nexhb, "kiosk-1", token).send(hour + timedelta(seconds=seconds))).status == 200
    path, seen, after = "/v1/devices/kiosk-1/heartbeats?limit=1", [], ""
    while True:
        page = await nexhb.get(path + after)
        seen += [beat["ts"] for beat in page["heartbeats"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert sorted(seen) == [shown(hour + timedelta(seconds=seconds)) for seconds in (35, 90, 1800)]


async def test_runs_of_jobs_go_on_page_by_page(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    for number in range(10):
        for job in ("nightly", "reconcile") if number < 3 else ("reconcile",):
            await conn.execute(
                "INSERT INTO job_runs (job, started_at, ended_at, status, host, counts) "
                "VALUES ($1, $2, $2, 'completed', 'x', '{}')",
                job, now,
            )  # fmt: skip
    whole = await nexhb.get("/ops/jobs")
    assert ({job: len(runs) for job, runs in whole["jobs"].items()}, whole["next"]) == (
        {"nightly": 3, "reconcile": 10},
        None,
    )
    seen: dict[str, list[int]] = {"nightly": [], "reconcile": []}
    page = await nexhb.get("/ops/jobs?limit=2")
    while True:
        for job, runs in page["jobs"].items():
            seen[job] += [run["run_no"] for run in runs]
        if page["next"] is None:
            break
        page = await nexhb.get(f"/ops/jobs?limit=2&after={page['next']}")
    assert seen == {job: [run["run_no"] for run in runs] for job, runs in whole["jobs"].items()}
    for wrong in ("5", "nightly", "nightly:x", "nightly:1,", "nightly:-1"):
        assert (await nexhb.get(f"/ops/jobs?after={wrong}", 400))["errors"][0]["path"] == "after"


async def test_history_is_from_included_to_excluded_newest_first(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    made = [now.replace(second=0, microsecond=0) - timedelta(minutes=minute) for minute in range(5)]
    for moment in made:
        await agent.live(moment)
    await agent.live(now - timedelta(days=3))
    path = f"/v1/devices/{agent.device_id}/heartbeats"
    start, end = (f"{moment:%Y-%m-%dT%H:%M:%SZ}" for moment in (made[3], made[1]))
    found = await nexhb.get(f"{path}?from={start}&to={end}")
    assert [beat["ts"] for beat in found["heartbeats"]] == [shown(made[2]), shown(made[3])]
    assert len((await nexhb.get(f"{path}?limit=2"))["heartbeats"]) == 2
    assert len((await nexhb.get(path))["heartbeats"]) == 5
    days = f"{now - timedelta(days=7):%Y-%m-%dT%H:%M:%S}+00:00"
    assert len((await nexhb.get(f"{path}?from={days}"))["heartbeats"]) == 6


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/devices?limit=0", "limit"), ("/v1/devices?limit=1001", "limit"), ("/v1/devices?limit=x", "limit"),
        ("/v1/devices?limit=%D9%A3", "limit"), ("/v1/devices?after=%00", "after"),
        ("/v1/devices/offline?minutes=-1", "minutes"), ("/v1/devices/offline?minutes=1e3", "minutes"),
        ("/v1/devices/x/heartbeats?from=yesterday", "from"), ("/v1/devices/x/heartbeats?to=2026-11-24T00:00:00", "to"),
    ],
)  # fmt: skip
async def test_a_bad_parameter_is_named(nexhb: Nexhb, path: str, name: str) -> None:
    problem = await nexhb.get(path, 400)
    assert problem["errors"][0]["path"] == name


async def test_an_unknown_device_is_404(nexhb: Nexhb) -> None:
    for path in ("/v1/devices/none", "/v1/devices/none/heartbeats", "/v1/devices/a%00b", f"/v1/devices/{'x' * 300}"):
        assert (await nexhb.get(path, 404))["title"] == "Not Found"


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
async def test_without_the_key_it_is_401(nexhb: Nexhb, method: str, path: str) -> None:
    device = await nexhb.agent()
    for headers in ({}, {"x-admin": "wrong"}, {"Authorization": f"Bearer {device.token}"}, {"x-admin": ADMIN_KEY[:-1]}):
        async with nexhb.http.request(method, nexhb.url + path, headers=headers) as response:
            assert response.status == 401
            assert response.content_type == "application/problem+json"


async def test_both_forms_of_the_admin_key_are_taken(nexhb: Nexhb) -> None:
    for headers in ({"x-admin": ADMIN_KEY}, {"Authorization": f"Bearer {ADMIN_KEY}"}):
        async with nexhb.http.get(f"{nexhb.url}/v1/fleet", headers=headers) as response:
            assert response.status == 200


async def test_health_and_readiness_need_no_key(nexhb: Nexhb) -> None:
    for path, key in (("/healthz", "ok"), ("/readyz", "ready")):
        async with nexhb.http.get(nexhb.url + path) as response:
            assert (response.status, (await response.json())[key]) == (200, True)


async def test_what_is_not_there_is_404_and_a_wrong_method_405(nexhb: Nexhb) -> None:
    assert (await nexhb.get("/v2/heartbeat", 404))["status"] == 404
    problem = await nexhb.get("/v1/heartbeat", 405)
    assert "POST" in problem["detail"]
    async with nexhb.http.post(f"{nexhb.url}/v1/fleet") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


async def test_head_is_taken_wherever_get_is_and_answered_without_a_body(nexhb: Nexhb) -> None:
    """Monitors and balancers ask with HEAD, and heard 405."""
    await nexhb.agent("kiosk-1")
    own = ("Date", "Content-Length")  # the length of one second's answer is not always that of the next one's
    for path in [route.path.format(device_id="kiosk-1") for route in ROUTES if route.method == "GET"] + [
        "/v1/devices/none", "/v1/devices?limit=0", "/v2/none", "//healthz"
    ]:  # fmt: skip
        heard = []
        for method in ("GET", "HEAD"):
            for key in ({"x-admin": ADMIN_KEY}, {}):
                async with nexhb.http.request(method, nexhb.url + path, headers=key) as response:
                    body = await response.read()
                    assert int(response.headers["Content-Length"]) > 0
                    assert bool(body) is (method == "GET")
                    heard.append((response.status, {k: v for k, v in response.headers.items() if k not in own}))
        assert heard[:2] == heard[2:], path


async def test_a_parameter_that_is_not_known_is_named_and_nothing_is_done(nexhb: Nexhb) -> None:
    """`?dryrun=true` of /ops/nightly was ignored, and the nightly run was made."""

    async def ask(route: Route, query: str) -> dict[str, str]:
        url = nexhb.url + route.path.format(device_id="kiosk-1") + query
        async with nexhb.http.request(route.method, url, headers={"x-admin": ADMIN_KEY}) as response:
            problem = await response.json(content_type="application/problem+json")
            assert response.status == 400
            return {error["path"]: error["message"] for error in problem["errors"]}

    for route in ROUTES:
        errors = await ask(route, "?dryrun=true&%E2%80%A8=1")
        assert list(errors) == ["dryrun", "\u2028"]
        assert all(name in errors["dryrun"] for name in route.query)
        for name in route.query:
            assert await ask(route, f"?{name}=1&{name}=1") == {name: "is given twice"}
    assert await nexhb.rows("SELECT FROM job_runs") == []


async def test_a_heavy_read_does_not_hold_up_ingest(
    start_daemon: StartDaemon, now: datetime, conn: Connection, database: Database
) -> None:
    url = SecretStr(database.dsn)
    nexhb = await start_daemon(database=DatabaseSettings(url=url, read_pool_size=1, read_timeout_seconds=1))
    agent = await nexhb.agent()
    await agent.live(now - timedelta(minutes=2))  # its facts are known: the next one touches device_last_status only
    async with conn.transaction():
        await conn.execute("LOCK TABLE devices IN ACCESS EXCLUSIVE MODE")  # the reads hang behind it
        reads = [asyncio.create_task(nexhb.get("/v1/fleet", 503)) for _ in range(5)]
        assert (await agent.live(now - timedelta(minutes=1))).status == 200
        assert not any(read.done() for read in reads)
        for read in reads:
            assert "detail" in await read
    assert (await nexhb.get("/v1/fleet"))["devices"] == 1
