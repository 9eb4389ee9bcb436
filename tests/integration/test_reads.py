"""Reads for operators are correct at the limits, paged by key, and require the admin key."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from nexhb import partitions
from nexhb.config import DatabaseSettings, IngestSettings
from nexhb.devices import registry
from nexhb.http.app import ROUTES, Route
from nexhb.postgres.connections import Connection, Database
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
    await registry.revoke(conn, "rev", now)
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
async def test_times_are_read_as_they_were_written_whatever_the_databases_defaults(
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


async def test_offline_is_correct_to_the_second(start_daemon: StartDaemon, now: datetime) -> None:
    noon = now.replace(hour=12, minute=0, second=0, microsecond=0)
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


async def test_a_list_has_the_same_order_whole_or_paged_and_from_either_source(
    start_daemon: StartDaemon, now: datetime
) -> None:
    """Some devices share a slot and some a moment, and they were sent in an unrelated order."""
    noon = now.replace(hour=12, minute=0, second=0, microsecond=0)
    nexhb = await start_daemon(now=noon)
    minutes = {"b": 61, "e": 20, "a": 61, "d": 62, "c": 300, "f": 21}
    for name, ago in minutes.items():
        await (await nexhb.agent(name)).live(noon - timedelta(minutes=ago), unity_process_running=False)
    orders = {"offline": ["c", "d", "a", "b", "f", "e"], "unity-down": ["e", "f", "b", "a", "d", "c"]}
    for source in ("last_status", "legacy"):
        flags = {"read_from_last_status": source == "last_status"}
        async with nexhb.http.put(f"{nexhb.url}/ops/flags", json=flags, headers={"x-admin": ADMIN_KEY}) as response:
            assert response.status == 200
        for which, order in orders.items():
            for limit in (1, 4, 6, 7):
                found = await nexhb.get(f"/v1/devices/{which}?limit={limit}")
                assert (found["source"], found["count"]) == (source, 6)
                assert [row["device_id"] for row in found["devices"]] == order[:limit]
                seen = [row["device_id"] for row in found["devices"]]
                while found["next"] is not None:
                    found = await nexhb.get(f"/v1/devices/{which}?limit={limit}&after={quote(found['next'])}")
                    assert found["count"] == 6, "the count includes all pages"
                    seen += [row["device_id"] for row in found["devices"]]
                assert seen == order
            for wrong in ("a", "2026-11-24T02:00:00Z", "2026-11-24T02:00:00/a", "x/a", "0001-01-01T00:00:00Z/a"):
                problem = await nexhb.get(f"/v1/devices/{which}?after={quote(wrong)}", 400)
                assert problem["errors"][0]["path"] == "after"


async def test_unity_down_counts_only_devices_that_sent_a_heartbeat_within_a_day(nexhb: Nexhb, now: datetime) -> None:
    old, fresh, unknown = [await nexhb.agent() for _ in range(3)]
    await old.live(now - timedelta(hours=25), unity_process_running=False)
    await fresh.live(now - timedelta(hours=23), unity_process_running=False)
    await unknown.send(now, unity_process_running=None, monitored_foreground_recent_s=-1)
    found = await nexhb.get("/v1/devices/unity-down")
    assert [row["device_id"] for row in found["devices"]] == [fresh.device_id]


async def test_pages_show_each_device_once_even_while_devices_are_added(nexhb: Nexhb, conn: Connection) -> None:
    for number in range(25):
        await registry.add(conn, f"d{number:02}", None)
    seen: list[str] = []
    page = await nexhb.get("/v1/devices?limit=10")
    while True:
        seen += [row["device_id"] for row in page["devices"]]
        await registry.add(conn, f"a{len(seen)}", None)  # sorts before the present page
        if page["next"] is None:
            break
        page = await nexhb.get(f"/v1/devices?limit=10&after={page['next']}")
    assert seen == [f"d{number:02}" for number in range(25)]


async def test_a_history_is_paged_and_its_end_is_marked(nexhb: Nexhb, now: datetime) -> None:
    """Formerly, the history ended at `limit` without a hint that there were more rows."""
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
            await agent.send(now + timedelta(seconds=10 * pages))  # newer than the present page
            page = await nexhb.get(f"{path}&limit={limit}&after={page['next']}")
        assert [ts for ts in seen if ts < shown(noon)] == [shown(moment) for moment in made]
        assert len(seen) == len(set(seen))
    assert (await nexhb.get(f"{path}&limit=8&after=0"))["heartbeats"] == []


async def test_a_page_of_an_old_history_opens_no_newer_partition(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """Otherwise each page would open the partitions of ninety days, of which all but one have no row for it."""
    agent = await nexhb.agent("kiosk-1")
    for days in (0, 3, 4):
        assert (await agent.send(now - timedelta(days=days))).status == 200
    path = f"/v1/devices/kiosk-1/heartbeats?from={now - timedelta(days=6):%Y-%m-%dT%H:%M:%SZ}&limit=1"
    page = await nexhb.get(path)
    page = await nexhb.get(f"{path}&after={page['next']}")
    async with conn.transaction():
        await conn.execute(f"LOCK TABLE {partitions.table_name(now.date())} IN ACCESS EXCLUSIVE MODE")
        page = await nexhb.get(f"{path}&after={page['next']}")
    assert [beat["ts"] for beat in page["heartbeats"]] == [shown(now - timedelta(days=4))]


async def test_a_history_is_paged_correctly_after_the_bucket_size_was_increased(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    """After a change of ingest.bucket_seconds, buckets and ts are in a different order for a short time."""
    hour = now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
    token = await registry.add(conn, "kiosk-1", None)
    for bucket_seconds, seconds in ((10, 35), (60, 90), (3600, 1800)):
        nexhb = await start_daemon(ingest=IngestSettings(bucket_seconds=bucket_seconds))
        assert (await Agent(nexhb, "kiosk-1", token).send(hour + timedelta(seconds=seconds))).status == 200
    path, seen, after = "/v1/devices/kiosk-1/heartbeats?limit=1", [], ""
    while True:
        page = await nexhb.get(path + after)
        seen += [beat["ts"] for beat in page["heartbeats"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert sorted(seen) == [shown(hour + timedelta(seconds=seconds)) for seconds in (35, 90, 1800)]


async def test_runs_of_jobs_are_paged(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
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


async def test_a_history_includes_from_and_excludes_to_and_is_newest_first(nexhb: Nexhb, now: datetime) -> None:
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
async def test_a_request_without_the_key_receives_401(nexhb: Nexhb, method: str, path: str) -> None:
    device = await nexhb.agent()
    for headers in ({}, {"x-admin": "wrong"}, {"Authorization": f"Bearer {device.token}"}, {"x-admin": ADMIN_KEY[:-1]}):
        async with nexhb.http.request(method, nexhb.url + path, headers=headers) as response:
            assert response.status == 401
            assert response.content_type == "application/problem+json"


async def test_both_forms_of_the_admin_key_are_accepted(nexhb: Nexhb) -> None:
    for headers in ({"x-admin": ADMIN_KEY}, {"Authorization": f"Bearer {ADMIN_KEY}"}):
        async with nexhb.http.get(f"{nexhb.url}/v1/fleet", headers=headers) as response:
            assert response.status == 200


async def test_health_and_readiness_need_no_key(nexhb: Nexhb) -> None:
    for path, key in (("/healthz", "ok"), ("/readyz", "ready")):
        async with nexhb.http.get(nexhb.url + path) as response:
            assert (response.status, (await response.json())[key]) == (200, True)


async def test_an_unknown_path_is_404_and_a_wrong_method_405(nexhb: Nexhb) -> None:
    assert (await nexhb.get("/v2/heartbeat", 404))["status"] == 404
    problem = await nexhb.get("/v1/heartbeat", 405)
    assert "POST" in problem["detail"]
    async with nexhb.http.post(f"{nexhb.url}/v1/fleet") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


def path_of(route: Route) -> str:
    """Return a path of the route."""
    return route.path.format(device_id="kiosk-1", site="store-1", incident_id=1, silence_id=1, route="on-call")


async def test_head_is_accepted_wherever_get_is_and_returns_no_body(nexhb: Nexhb) -> None:
    """Monitors and load balancers send HEAD requests. Formerly, they received 405."""
    await nexhb.agent("kiosk-1")
    own = ("Date", "Content-Length")  # the length of a response may change from one second to the next
    # GET /v1/stream has no end.
    paths = [path_of(route) for route in ROUTES if route.method == "GET" and route.path != "/v1/stream"]
    for path in (*paths, "/v1/devices/none", "/v1/devices?limit=0", "/v2/none", "//healthz"):
        responses = []
        for method in ("GET", "HEAD"):
            for key in ({"x-admin": ADMIN_KEY}, {}):
                async with nexhb.http.request(method, nexhb.url + path, headers=key) as response:
                    body = await response.read()
                    assert int(response.headers["Content-Length"]) > 0
                    assert bool(body) is (method == "GET")
                    responses.append((response.status, {k: v for k, v in response.headers.items() if k not in own}))
        assert responses[:2] == responses[2:], path


async def test_an_unknown_parameter_is_named_and_nothing_is_done(nexhb: Nexhb) -> None:
    """Formerly, `?dryrun=true` of /ops/nightly was ignored, and the nightly run took place."""

    async def ask(route: Route, query: str) -> dict[str, str]:
        url = nexhb.url + path_of(route) + query
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
    # The device's facts are stored: the next heartbeat writes device_last_status only.
    await agent.live(now - timedelta(minutes=2))
    async with conn.transaction():
        await conn.execute("LOCK TABLE devices IN ACCESS EXCLUSIVE MODE")  # the reads wait for this lock
        reads = [asyncio.create_task(nexhb.get("/v1/fleet", 503)) for _ in range(5)]
        assert (await agent.live(now - timedelta(minutes=1))).status == 200
        assert not any(read.done() for read in reads)
        for read in reads:
            assert "detail" in await read
    assert (await nexhb.get("/v1/fleet"))["devices"] == 1
