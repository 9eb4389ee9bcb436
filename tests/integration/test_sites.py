"""Sites over HTTP, the site, tags and name that operators give a device, and the lists by site."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import orjson
import pytest
from yarl import URL

from nexhb.devices import csv_import, enrolment, registry, sites
from nexhb.devices.sites import Site
from nexhb.errors import BadInput, SiteInUse, UnknownSite
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from tests.conftest import ADMIN_KEY, Nexhb
from tests.support import forks

Call = Callable[..., Awaitable[tuple[int, Any]]]
Run = Callable[..., Awaitable[tuple[int, str, str]]]
BERLIN = {"name": "Berlin, Hauptbahnhof", "zone": "Europe/Berlin", "hours": "Mo-Sa 08:00-20:00; Dec 24-26 off"}
NONE = {"devices": 0, "online": 0, "offline": 0, "unity_down": 0, "silenced": None}
ALWAYS = {"name": None, "zone": "UTC", "hours": None, "open": True, **NONE}


@pytest.fixture
def call(nexhb: Nexhb) -> Call:
    """Return a function that makes a call as the operator, and returns its status and body."""

    async def make(method: str, path: str, body: object = None) -> tuple[int, Any]:
        headers = {"x-admin": ADMIN_KEY, "Content-Type": "application/json"}
        data = None if body is None else orjson.dumps(body)
        url = URL(nexhb.url + path, encoded=True)
        async with nexhb.http.request(method, url, data=data, headers=headers) as response:
            return response.status, await response.json() if response.status != 204 else None

    return make


async def test_a_site_is_set_replaced_listed_and_removed(call: Call) -> None:
    assert await call("GET", "/v1/sites") == (200, {"sites": [], "next": None})
    assert await call("GET", "/v1/sites/berlin") == (
        404,
        {
            "type": "about:blank", "title": "Not Found", "status": 404,
            "detail": "Site not found: 'berlin'. `nexhb sites list` shows all sites.",
        },
    )  # fmt: skip
    status, berlin = await call("PUT", "/v1/sites/berlin", BERLIN)
    assert (status, berlin) == (201, {"site": "berlin", **BERLIN, "open": berlin["open"], **NONE})
    assert await call("PUT", "/v1/sites/berlin", BERLIN) == (200, berlin)
    assert await call("PUT", "/v1/sites/berlin", {"hours": "24/7 off"}) == (
        200, {"site": "berlin", **ALWAYS, "hours": "24/7 off", "open": False},
    )  # fmt: skip
    assert (await call("GET", "/v1/sites/berlin"))[1]["open"] is False
    strange = "渋谷店/3 号;機?"
    assert await call("PUT", f"/v1/sites/{quote(strange, safe='')}") == (201, {"site": strange, **ALWAYS})
    first = (await call("GET", "/v1/sites?limit=1"))[1]
    assert ([site["site"] for site in first["sites"]], first["next"]) == (["berlin"], "berlin")
    second = (await call("GET", "/v1/sites?limit=1&after=berlin"))[1]
    assert ([site["site"] for site in second["sites"]], second["next"]) == ([strange], None)
    assert await call("DELETE", "/v1/sites/berlin") == (204, None)
    assert (await call("DELETE", "/v1/sites/berlin"))[0] == 404


async def test_a_site_that_is_not_valid_is_refused_by_its_field(call: Call) -> None:
    for body, field, message in (
        ({"hours": "Mo-Fr 8-20"}, "hours", "hours 'Mo-Fr 8-20' cannot be read at character 7."),
        ({"hours": 7}, "hours", "Expected `str | null`, got `int`"),
        ({"zone": "Mars/Olympus"}, "zone", "zone 'Mars/Olympus' is not a time zone of the IANA database."),
        ({"zone": None}, "zone", "Expected `str`, got `null`"),
        ({"name": "a\u0007b"}, "name", "name takes 1 to 200 printable characters; U+0007 is not printable."),
        ({"hour": "24/7"}, "hour", "Object contains unknown field"),
        ([], "", "Expected `object`, got `array`"),
    ):
        status, problem = await call("PUT", "/v1/sites/berlin", body)
        assert (status, problem["errors"]) == (422, [{"path": field, "message": message}])
    assert await call("GET", "/v1/sites") == (200, {"sites": [], "next": None})


async def test_an_id_that_is_not_printable_or_too_long_is_refused(call: Call) -> None:
    for site in ("a%00b", "a%0Ab", "x" * 101):
        status, problem = await call("PUT", f"/v1/sites/{site}")
        assert (status, problem["errors"][0]["path"]) == (422, "site")
        assert (await call("GET", f"/v1/sites/{site}"))[0] == (await call("DELETE", f"/v1/sites/{site}"))[0] == 404


async def test_a_site_with_devices_stays_and_revoked_devices_do_not_keep_it(
    call: Call, nexhb: Nexhb, conn: Connection
) -> None:
    await call("PUT", "/v1/sites/berlin", BERLIN)
    for number in range(3):
        await nexhb.agent(f"kiosk-{number}")
        assert (await call("PATCH", f"/v1/devices/kiosk-{number}", {"site": "berlin"}))[0] == 200
    assert (await call("GET", "/v1/sites"))[1]["sites"][0]["devices"] == 3
    status, problem = await call("DELETE", "/v1/sites/berlin")
    assert (status, problem["detail"]) == (
        409,
        "The site cannot be removed: 'berlin' has 3 devices. `nexhb devices set ID --site OTHER` moves a device, "
        "`--no-site` takes it out.",
    )
    await call("PATCH", "/v1/devices/kiosk-0", {"site": None})
    await registry.revoke(conn, "kiosk-1", nexhb.clock())
    assert (await call("GET", "/v1/sites/berlin"))[1]["devices"] == 1
    assert "has 1 device." in (await call("DELETE", "/v1/sites/berlin"))[1]["detail"]
    await registry.revoke(conn, "kiosk-2", nexhb.clock())
    assert await call("DELETE", "/v1/sites/berlin") == (204, None)
    assert (await call("GET", "/v1/devices/kiosk-2"))[1]["site"] is None


async def test_what_operators_say_of_a_device_is_changed_field_by_field(
    call: Call, nexhb: Nexhb, now: datetime
) -> None:
    agent = await nexhb.agent("kiosk-1")
    await call("PUT", "/v1/sites/berlin", BERLIN)

    async def change(body: object) -> tuple[Any, ...]:
        status, device = await call("PATCH", "/v1/devices/kiosk-1", body)
        shown = (await call("GET", "/v1/devices/kiosk-1"))[1]
        assert {**device, "as_of": None} == {**shown, "as_of": None}
        return status, device["site"], device["tags"], device["name"]

    assert await change({"site": "berlin", "tags": ["outdoor", "big", "outdoor"]}) == (
        200, "berlin", ["big", "outdoor"], None,
    )  # fmt: skip
    assert await change({"name": "By the door"}) == (200, "berlin", ["big", "outdoor"], "By the door")
    assert await change({}) == (200, "berlin", ["big", "outdoor"], "By the door")
    await agent.live(now - timedelta(minutes=1), alias="Kiosk 001")
    assert await change(None) == (200, "berlin", ["big", "outdoor"], "By the door")
    assert await change({"site": None, "tags": [], "name": None}) == (200, None, [], None)


async def test_a_change_of_a_device_that_is_not_valid_is_refused_by_its_field(call: Call, nexhb: Nexhb) -> None:
    await nexhb.agent("kiosk-1")
    no_tag = "is not a tag; a tag has 1 to 50 printable characters, without blanks, commas and semicolons."
    for body, field, message in (
        ({"site": "nowhere"}, "site", "site 'nowhere' not found."),
        ({"site": ""}, "site", "site takes 1 to 100 printable characters."),
        ({"name": ""}, "name", "name takes 1 to 200 printable characters."),
        ({"tags": [f"tag-{n}" for n in range(21)]}, "tags", "tags takes at most 20 tags."),
        ({"tags": None}, "tags", "Expected `array`, got `null`"),
        ({"tags": [7]}, "tags[0]", "Expected `str`, got `int`"),
        *(
            ({"tags": ["good", tag]}, "tags", f"tags: '{tag}' {no_tag}")
            for tag in ("", "two words", "a;b", "a,b", "x" * 51)
        ),
    ):
        status, problem = await call("PATCH", "/v1/devices/kiosk-1", body)
        assert (status, problem["errors"]) == (422, [{"path": field, "message": message}])
    assert (await call("PATCH", "/v1/devices/kiosk-2", {"tags": []}))[0] == 404
    assert (await call("PATCH", "/v1/devices/offline", {"tags": []}))[0] == 404
    status, problem = await call("POST", "/v1/devices/offline")
    assert (status, problem["detail"]) == (405, "/v1/devices/offline accepts GET, HEAD.")


async def test_a_scope_of_sites_hides_all_others(conn: Connection) -> None:
    for site in ("a", "b", "c"):
        await sites.put(conn, Site(site))
    assert [site.site for site in await sites.page(conn, "", 9, within=("a", "c", "x"))] == ["a", "c"]
    assert await sites.page(conn, "", 9, within=()) == []
    assert (await sites.get(conn, "a", within=("a",))).site == "a"
    with pytest.raises(UnknownSite):
        await sites.get(conn, "b", within=("a",))


async def test_hours_that_nobody_can_read_any_more_count_as_always_open(call: Call, conn: Connection) -> None:
    await conn.execute("INSERT INTO sites (site, zone, hours) VALUES ('a', 'Mars/Olympus', 'sometimes')")
    assert (await call("GET", "/v1/sites/a"))[1]["open"] is True


async def test_a_device_assigned_while_its_site_is_removed_keeps_the_site(conn: Connection, nexhb: Nexhb) -> None:
    await sites.put(conn, Site("a"))
    await nexhb.agent("kiosk-1")
    async with nexhb.database.connected(application="test") as other:
        async with other.transaction():
            await other.execute("UPDATE devices SET site = 'a'")
            await conn.execute("SET lock_timeout = '100ms'")
            with pytest.raises(asyncpg.LockNotAvailableError):
                await sites.remove(conn, "a")
        with pytest.raises(SiteInUse):
            await sites.remove(conn, "a")
        await registry.change(conn, "kiosk-1", {"site": None})
        async with other.transaction():
            await other.fetch(sql.queries("sites")["hold"], "a")  # the removal has begun: no device may get the site
            with pytest.raises(asyncpg.LockNotAvailableError):
                await registry.change(conn, "kiosk-1", {"site": "a"})


async def test_the_lists_show_sites_and_are_limited_to_a_site_or_a_tag(
    call: Call, nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """Both sources of the lists agree, and a page of a limited list continues where the previous one ended."""
    for name in ("a", "b"):
        await call("PUT", f"/v1/sites/{name}")
    for number, (site, tags) in enumerate([("a", ["x"]), ("a", []), ("b", ["x", "y"]), (None, ["y"])]):
        agent = await nexhb.agent(f"kiosk-{number}")
        sent = await agent.live(now - timedelta(minutes=60 - number), unity_process_running=False)
        assert sent.status == 200
        await call("PATCH", f"/v1/devices/kiosk-{number}", {"site": site, "tags": tags})
    await nexhb.agent("kiosk-4")
    await call("PATCH", "/v1/devices/kiosk-4", {"site": "b", "tags": ["never-seen"]})

    async def listed(path: str) -> list[tuple[str, str | None]]:
        found = (await call("GET", path))[1]
        rows = [(row["device_id"].removeprefix("kiosk-"), row["site"]) for row in found["devices"]]
        assert found.get("count", len(rows)) == len(rows) or "limit" in path
        return rows

    everywhere = [("0", "a"), ("1", "a"), ("2", "b"), ("3", None)]
    expected = {
        "": everywhere, "site=a": everywhere[:2], "site=b": everywhere[2:3], "site=c": [], "tag=z": [],
        "tag=x": [("0", "a"), ("2", "b")], "tag=y&site=b": everywhere[2:3], "limit=1&site=a": everywhere[:1],
    }  # fmt: skip
    for fast in (True, False):
        await call("PUT", "/ops/flags", {"read_from_last_status": fast})
        for query, rows in expected.items():
            assert await listed(f"/v1/devices/offline?{query}") == rows
            if "limit" not in query:
                assert await listed(f"/v1/devices/unity-down?{query}") == rows[::-1]
        first = (await call("GET", "/v1/devices/offline?limit=1&site=a"))[1]
        assert first["count"] == 2
        second = (await call("GET", f"/v1/devices/offline?limit=1&site=a&after={quote(first['next'])}"))[1]
        assert ([row["device_id"] for row in second["devices"]], second["next"]) == (["kiosk-1"], None)
        assert second["source"] == ("last_status" if fast else "legacy")
    assert await listed("/v1/devices") == [*everywhere, ("4", "b")]
    assert await listed("/v1/devices?site=b") == [("2", "b"), ("4", "b")]
    assert await listed("/v1/devices?tag=x&limit=1&after=kiosk-0") == [("2", "b")]
    [never_seen] = (await call("GET", "/v1/devices?tag=never-seen"))[1]["devices"]
    assert (never_seen["status"], never_seen["online"], never_seen["last_ts"]) == ("never_seen", False, None)
    await registry.revoke(conn, "kiosk-0", nexhb.clock())
    assert [row["status"] for row in (await call("GET", "/v1/devices?site=a"))[1]["devices"]] == ["revoked", "ok"]
    status, problem = await call("GET", f"/v1/devices?tag={'x' * 51}")
    assert (status, problem["errors"][0]["path"]) == (400, "tag")


# ---- commands, files and enrolment keys -----------------------------------------------------------------------------


@pytest.fixture
def run(nexhb: Nexhb, tmp_path: Path) -> Run:
    """Return a function that runs a command beside the test's daemon."""
    environment = {
        "DATABASE_URL": nexhb.database.dsn, "ADMIN_KEY": ADMIN_KEY, "NEXHB_DATA_DIR": str(tmp_path), "PATH": "",
        "NEXHB_SERVER__PORT": nexhb.url.rpartition(":")[2],
    }  # fmt: skip

    async def command(*arguments: str) -> tuple[int, str, str]:
        done = await asyncio.to_thread(forks.run, "nexhb", arguments, env=environment, timeout=50)
        return done.returncode, done.stdout, done.stderr

    return command


async def test_commands_set_list_and_remove_sites(run: Run) -> None:
    assert await run("sites", "set", "a b/c", "--zone", "Europe/Berlin", "--hours", "24/7 off") == (
        0, "a b/c: Europe/Berlin, 24/7 off.\n", "",
    )  # fmt: skip
    assert await run("sites", "set", "a b/c", "--name", "Berlin") == (0, "a b/c: Europe/Berlin, 24/7 off.\n", "")
    assert (await run("sites", "list"))[1] == (
        "site\tname\tzone\thours\tnow\tdevices\na b/c\tBerlin\tEurope/Berlin\t24/7 off\tclosed\t0\n"
    )
    assert (await run("sites", "set", "a b/c", "--hours", "", "--name", ""))[
        1
    ] == "a b/c: Europe/Berlin, always open.\n"
    [site] = orjson.loads((await run("sites", "list", "--json"))[1])["sites"]
    assert site == {"site": "a b/c", **ALWAYS, "zone": "Europe/Berlin"}
    code, _, error = await run("sites", "set", "a b/c", "--zone", "Berlin")
    assert (code, "zone 'Berlin' is not a time zone of the IANA database." in error) == (2, True)
    assert await run("sites", "remove", "a b/c") == (0, "a b/c is removed.\n", "")
    code, _, error = await run("sites", "remove", "a b/c")
    assert (code, "Site not found: 'a b/c'." in error) == (1, True)


async def test_a_file_of_sites_is_set_as_a_whole_or_not_at_all(run: Run, tmp_path: Path, call: Call) -> None:
    file = tmp_path / "sites.csv"
    file.write_text('Site;Name;Zone;Hours\na;;;\nb;Berlin;Europe/Berlin;"Mo-Sa 08:00-20:00; Su off"\n\n')
    assert await run("sites", "import", str(file)) == (0, "2 sites set.\n", "")
    found = (await call("GET", "/v1/sites"))[1]["sites"]
    assert [(site["site"], site["name"], site["zone"], site["hours"]) for site in found] == [
        ("a", None, "UTC", None), ("b", "Berlin", "Europe/Berlin", "Mo-Sa 08:00-20:00; Su off"),
    ]  # fmt: skip
    for text, message in (
        ("site,hours\nc,\nd,8-20\nc,\n,\n",
         "line 3: hours '8-20' cannot be read at character 1. line 4: site 'c' is in the file twice. Nothing was "
         "imported."),
        ("site,name\n,nameless\n", "line 2: site takes 1 to 100 printable characters."),
        ("site,hour\nc,24/7\n", "the first line may name site, name, zone, hours; it has 'hour'."),
        ("name,hours\nc,24/7\n", "it does not name site."),
        ("site,name\nc,d,e\n", "line 2: it has more columns than the first line."),
        ('site,name\nc,"d\n', "line 2: unexpected end of data."),
    ):  # fmt: skip
        file.write_text(text)
        code, _, error = await run("sites", "import", str(file))
        assert (code, message in error) == (2, True), error
    assert len((await call("GET", "/v1/sites"))[1]["sites"]) == 2
    assert (await run("sites", "import", str(tmp_path / "none.csv")))[0] == 2


async def test_devices_set_changes_what_is_given(run: Run, call: Call, nexhb: Nexhb) -> None:
    await nexhb.agent("kiosk/1")
    await call("PUT", "/v1/sites/berlin")
    assert await run("devices", "set", "kiosk/1", "--site", "berlin", "--tag", "b", "--tag", "a", "--name", "Door") == (
        0, "kiosk/1: berlin; a, b; Door.\n", "",
    )  # fmt: skip
    code, out, _ = await run("devices", "set", "kiosk/1", "--no-tags", "--json")
    assert (code, orjson.loads(out)) == (0, {"device_id": "kiosk/1", "site": "berlin", "tags": [], "name": "Door"})
    assert (await run("devices", "set", "kiosk/1", "--no-site", "--name", ""))[
        1
    ] == "kiosk/1: no site; no tags; no name.\n"
    for arguments, code, message in (
        (["kiosk/1"], 2, "nothing to change was given."),
        (["kiosk/1", "--site", "berlin", "--no-site"], 2, "--no-site excludes --site"),
        (["kiosk/1", "--site", "nowhere"], 2, "site 'nowhere' not found."),
        (["kiosk/2", "--no-site"], 1, "Device not found: 'kiosk/2'."),
    ):
        exit_code, _, error = await run("devices", "set", *arguments)
        assert (exit_code, message in error) == (code, True), error


async def test_a_command_without_its_daemon_says_so(database: Database, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = str(nobody.getsockname()[1])
        env = {"DATABASE_URL": database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "NEXHB_SERVER__PORT": port, "PATH": ""}
        done = await asyncio.to_thread(forks.run, "nexhb", ["sites", "list"], env=env, timeout=50)
    assert (done.returncode, "The daemon does not answer." in done.stderr) == (1, True)
    assert "`nexhb serve` runs it." in done.stderr


async def test_an_import_of_devices_sets_sites_and_tags_and_keeps_those_of_empty_cells(
    conn: Connection, tmp_path: Path
) -> None:
    await sites.put(conn, Site("a"))
    await sites.put(conn, Site("b"))
    file = tmp_path / "devices.csv"

    async def bring(*lines: str) -> list[tuple[Any, ...]]:
        file.write_text("\n".join(["device_id,token,site,tags", *lines]))
        await csv_import.import_csv(conn, file)
        return [tuple(row) for row in await conn.fetch("SELECT device_id, site, tags FROM devices ORDER BY device_id")]

    tokens = [f"{n}" * 40 for n in range(3)]
    assert await bring(f"k-0,{tokens[0]},a,outdoor big;outdoor", f"k-1,{tokens[1]},,") == [
        ("k-0", "a", ["big", "outdoor"]), ("k-1", None, []),
    ]  # fmt: skip
    assert await bring(f"k-0,{tokens[0]},,", f"k-1,{tokens[1]},b,x") == [
        ("k-0", "a", ["big", "outdoor"]), ("k-1", "b", ["x"]),
    ]  # fmt: skip
    with pytest.raises(
        BadInput, match=r"line 3 \(k-2\): column site: site 'nowhere' not found\. Nothing was imported\."
    ):
        await bring(f"k-1,{tokens[1]},a,", f"k-2,{tokens[2]},nowhere,")
    with pytest.raises(BadInput, match=r"line 2: column tags: 'y{51}' is not a tag"):
        await bring(f"k-1,{tokens[1]},a,{'y' * 51}")
    assert await conn.fetchval("SELECT site FROM devices WHERE device_id = 'k-1'") == "b"


async def test_a_device_that_registers_with_the_key_of_a_site_belongs_to_it(conn: Connection, now: datetime) -> None:
    await sites.put(conn, Site("a"))
    until = now + timedelta(hours=1)
    key = await enrolment.issue_enrolment_key(conn, note=None, uses=2, expires_at=until, site="a")
    await enrolment.enrol(conn, key, "kiosk-1", None, now)
    await registry.change(conn, "kiosk-1", {"site": None})
    await enrolment.enrol(conn, key, "kiosk-1", None, now)  # its response was lost; the operator's change stays
    await enrolment.enrol(conn, key, "kiosk-2", None, now)
    found = await conn.fetch("SELECT device_id, site FROM devices ORDER BY device_id")
    assert [tuple(row) for row in found] == [("kiosk-1", None), ("kiosk-2", "a")]
    with pytest.raises(BadInput, match="site 'nowhere' not found"):
        await enrolment.issue_enrolment_key(conn, note=None, uses=1, expires_at=until, site="nowhere")
    await registry.change(conn, "kiosk-2", {"site": None})
    key = await enrolment.issue_enrolment_key(conn, note=None, uses=1, expires_at=until, site="a")
    await sites.remove(conn, "a")
    await enrolment.enrol(conn, key, "kiosk-3", None, now)
    assert await conn.fetchval("SELECT site FROM devices WHERE device_id = 'kiosk-3'") is None


async def test_a_key_of_a_site_is_issued_over_http_and_by_command(run: Run, call: Call, conn: Connection) -> None:
    await call("PUT", "/v1/sites/a")
    assert (await call("POST", "/ops/enrolment-keys", {"site": "a"}))[0] == 200
    assert (await run("devices", "enrolment-key", "--site", "a"))[0] == 0
    assert [row["site"] for row in await conn.fetch("SELECT site FROM enrolment_keys")] == ["a", "a"]
    status, problem = await call("POST", "/ops/enrolment-keys", {"site": "b"})
    assert (status, problem["errors"]) == (422, [{"path": "site", "message": "site 'b' not found."}])
