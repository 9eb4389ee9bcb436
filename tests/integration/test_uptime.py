"""GET /v1/uptime adds up what device_days and, for the present day, the heartbeats themselves show."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest

from nexhb import cli, partitions
from nexhb.errors import DatabaseUnavailable
from nexhb.http.operator_api import uptime
from nexhb.postgres.connections import Connection
from nexhb.watching import device_days, months, uptime_reads
from nexhb.watching.device_days import DayTable, UptimeRules
from nexhb.watching.uptime import Circumstances, DayParts, Range, share
from nexhb.watching.uptime_reads import UptimePage, UptimeQuery, UptimeReads
from tests.conftest import ADMIN_KEY, Nexhb, StartDaemon
from tests.support import forks
from tests.support.clock import START as NOON
from tests.support.stored_heartbeats import store
from tests.support.uptime_truth import Sent, history, true_parts, usual

Run = Callable[..., Awaitable[list[str]]]

TODAY = NOON.date()
DAY = timedelta(days=1)
RULES = UptimeRules()
PARTS = ("closed", "ours", "heard", "replayed", "off", "unknown", "unity")


@dataclass
class Fleet:
    """A daemon whose clock stands at noon, and devices with a known history."""

    nexhb: Nexhb
    conn: Connection
    numbers: dict[str, int] = field(default_factory=dict)

    async def add(
        self,
        device_id: str,
        sent: Sequence[Sent] = (),
        site: str | None = None,
        created: datetime = NOON - 30 * DAY,
        tags: Sequence[str] = (),
    ) -> None:
        if site is not None:
            await self.conn.execute("INSERT INTO sites (site) VALUES ($1) ON CONFLICT DO NOTHING", site)
        self.numbers[device_id] = await self.conn.fetchval(
            "INSERT INTO devices (device_id, created_at, site, tags) VALUES ($1, $2, $3, $4) RETURNING device_no",
            device_id, created, site, list(tags),
        )  # fmt: skip
        await store(self.conn, self.numbers[device_id], sent)

    async def make(self, *days: date) -> None:
        """Make these days, as the nightly run does."""
        for day, table in (await partitions.ensure(self.conn, list(days))).items():
            await device_days.make_due(self.conn, DayTable(day, table), RULES, NOON)

    async def read(self, **parameters: object) -> dict[str, Any]:
        """Return the response to a read; `start` is the parameter `from`."""
        answer: dict[str, Any] = await self.nexhb.get(path(**parameters))
        return answer

    async def rows(self, **parameters: object) -> dict[str | None, dict[str, Any]]:
        """Return the rows of a read by their keys."""
        found = (await self.read(**parameters))["uptime"]
        return {row.get("device_id") or row.get("site"): row for row in found}

    async def csv(self, **parameters: object) -> list[dict[str, str]]:
        url = self.nexhb.url + path(**parameters, format="csv")
        async with self.nexhb.http.get(url, headers={"x-admin": ADMIN_KEY}) as response:
            assert (response.status, response.content_type) == (200, "text/csv")
            return list(csv.DictReader(io.StringIO(await response.text(), newline="")))

    async def refused(self, **parameters: object) -> tuple[str, str]:
        """Return the parameter that a refusal names, and what is wrong with it."""
        [error] = (await self.nexhb.get(path(**parameters), 400))["errors"]
        return error["path"], error["message"]


def path(**parameters: object) -> str:
    names = {"start": "from", "end": "to"}
    given = "&".join(f"{names.get(name, name)}={quote(str(value))}" for name, value in parameters.items())
    return f"/v1/uptime?{given}"


@pytest.fixture
async def fleet(start_daemon: StartDaemon, conn: Connection) -> Fleet:
    return Fleet(await start_daemon(now=NOON), conn)


def regular(start: datetime, end: datetime) -> list[Sent]:
    """Return a heartbeat every minute of a device that has been up for long."""
    first = start.timestamp()
    times = [first + 60 * n for n in range(int((end - start).total_seconds() // 60))]
    return [Sent(at, at + 1, int(at - first) + 900_000, True, 80) for at in times]


def true_day(sent: Sequence[Sent], day: date) -> DayParts:
    """Return the parts of a day of a device without a site, according to the oracle."""
    start, end = partitions.midnight(day), NOON + DAY
    always = [Range((start - DAY).timestamp(), (end + DAY).timestamp())]
    circumstances = Circumstances(
        start.timestamp(), NOON.timestamp(), RULES.offline_after_s, always, [], (NOON - 30 * DAY).timestamp()
    )
    begin = start.timestamp() - RULES.offline_after_s - 900
    read = [one for one in sent if begin <= one.at < (start + DAY).timestamp()]
    parts = true_parts(sent, circumstances, *usual(read, circumstances, RULES.interval_s))
    assert parts is not None
    return parts


def minutes(row: dict[str, Any]) -> dict[str, float]:
    """Return the parts of a row that are not 0."""
    return {part: row[f"{part}_minutes"] for part in PARTS[:-1] if row[f"{part}_minutes"]}


async def test_devices_and_the_fleet_have_the_sums_of_the_true_days(fleet: Fleet) -> None:
    """Yesterday is made, and today is computed on the way; the oracle looks at every moment of both."""
    random = Random(11)  # noqa: S311 - no secret
    expected: dict[str, list[DayParts]] = {}
    for n in range(8):
        begin = partitions.midnight(TODAY - DAY).timestamp()
        sent = [one for one in history(random, begin) if one.received <= NOON.timestamp()]
        await fleet.add(f"kiosk-{n}", sent)
        expected[f"kiosk-{n}"] = [true_day(sent, day) for day in (TODAY - DAY, TODAY)]
    await fleet.make(TODAY - DAY)

    answer = await fleet.read(start=TODAY - DAY)
    assert (answer["from"], answer["to"], answer["left_out"]) == (f"{TODAY - DAY}", f"{TODAY + DAY}", 0)
    assert [row["device_id"] for row in answer["uptime"]] == list(expected)
    for row in answer["uptime"]:
        days = expected[row["device_id"]]
        assert [round(row[f"{part}_minutes"] * 10) for part in PARTS] == [
            sum(getattr(day, part) for day in days) for part in PARTS
        ]
        assert row["battery_least"] == min((d.battery_least for d in days if d.battery_least is not None), default=None)
        assert (row["days"], row["days_missing"]) == (2, 0)

    [total] = (await fleet.read(start=TODAY - DAY, by="fleet"))["uptime"]
    sums = {part: sum(getattr(day, part) for days in expected.values() for day in days) for part in PARTS}
    assert [round(total[f"{part}_minutes"] * 10) for part in PARTS] == list(sums.values())
    whole = sum(sums.values()) - sums["unity"]
    assert total["share"] == round(share(sums["heard"], sums["replayed"], whole, 0, 0) or 0, 6)
    for key in ("flaps", "reboots"):
        assert total[key] == sum(row[key] for row in answer["uptime"])
    assert (await fleet.rows(start=TODAY - DAY, by="site"))[None] == {"site": None, **total}


async def test_a_day_belongs_to_the_site_that_the_device_had_on_it(fleet: Fleet) -> None:
    midnight = partitions.midnight(TODAY)
    await fleet.add("moved", regular(midnight - 2 * DAY, NOON), "a", NOON - 2 * DAY)
    await fleet.add("stays", regular(midnight - DAY, NOON), "b", NOON - 2 * DAY)
    await fleet.make(TODAY - 2 * DAY, TODAY - DAY)
    await fleet.conn.execute("UPDATE devices SET site = 'b' WHERE device_id = 'moved'")

    sites = await fleet.rows(by="site", start=TODAY - 2 * DAY)
    assert {site: (row["days"], minutes(row)["heard"]) for site, row in sites.items()} == {
        "a": (2, 2 * 1440.0),
        "b": (4, 1440.0 + 2 * 720),
    }
    in_a = await fleet.rows(start=TODAY - 2 * DAY, site="a")
    assert {device: (row["days"], row["site"]) for device, row in in_a.items()} == {"moved": (2, "b")}
    in_b = await fleet.rows(start=TODAY - 2 * DAY, site="b")
    assert {device: row["days"] for device, row in in_b.items()} == {"moved": 1, "stays": 3}
    for site in ("a", "b"):
        assert (await fleet.rows(by="fleet", start=TODAY - 2 * DAY, site=site))[None]["days"] == sites[site]["days"]
    await fleet.conn.execute("DELETE FROM sites WHERE site = 'a'")
    assert (await fleet.rows(start=TODAY - 2 * DAY, site="a", by="site"))["a"]["days"] == 2


async def test_days_without_rows_are_missing_and_count_as_nothing_else(fleet: Fleet) -> None:
    midnight = partitions.midnight(TODAY)
    await fleet.add("old", regular(midnight - 3 * DAY, NOON), "a")
    await fleet.add("young", (), "a", midnight - 4 * DAY)
    await fleet.add("gone", ())
    await fleet.conn.execute("UPDATE devices SET revoked_at = $1 WHERE device_id = 'gone'", midnight - 4.5 * DAY)
    await fleet.make(TODAY - 3 * DAY)
    await months.ensure(fleet.conn, TODAY - 4 * DAY)  # of this day, a run that was killed has left a row
    columns = ", ".join(device_days.COLUMNS[2:])
    await fleet.conn.execute(
        f"INSERT INTO device_days (device_no, day, {columns}) SELECT device_no, day - 1, {columns} FROM device_days"
    )

    rows = await fleet.rows(start=TODAY - 6 * DAY, end=TODAY)
    # Yesterday is computed, although the nightly run has not made it yet.
    assert {device: (row["days"], row["days_missing"]) for device, row in rows.items()} == {
        "old": (2, 4),
        "young": (2, 2),
        "gone": (0, 2),
    }
    assert minutes(rows["old"]) == {"heard": 2 * 1440}
    assert rows["gone"]["share"] is None
    sites = await fleet.rows(start=TODAY - 6 * DAY, end=TODAY, by="site")
    assert {site: (row["days"], row["days_missing"]) for site, row in sites.items()} == {"a": (4, 6), None: (0, 2)}
    [total] = (await fleet.read(start=TODAY - 6 * DAY, end=TODAY, by="fleet"))["uptime"]
    assert (total["days"], total["days_missing"]) == (4, 8)
    assert [*await fleet.rows(start=TODAY - 3 * DAY)] == ["old", "young"]  # "gone" was revoked before


async def test_devices_beyond_the_limit_are_left_out_of_today_and_counted(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device_id, site in {"1": "b", "2": "a", "3": None, "4": "b", "5": "a"}.items():
        await fleet.add(device_id, regular(NOON - DAY / 24, NOON), site, NOON - DAY / 24)
    monkeypatch.setattr(uptime_reads, "MAX_COMPUTED", 3)
    answer = await fleet.read(start=TODAY, by="site")
    assert {row["site"]: (row["days"], row["left_out"]) for row in answer["uptime"]} == {
        "a": (2, 0),
        "b": (1, 1),
        None: (0, 1),
    }
    assert answer["left_out"] == 2
    assert (await fleet.read(start=TODAY, by="fleet"))["left_out"] == 2
    answer = await fleet.read(start=TODAY)
    assert (len(answer["uptime"]), answer["left_out"]) == (5, 0)


async def test_pages_and_csv_have_the_same_rows(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for device_id, site, tags in (("=1+1", "a", []), ("b", None, ["vip"]), ("c", "b", ["vip"])):
        await fleet.add(device_id, regular(NOON - DAY / 24, NOON), site, NOON - DAY / 24, tags)
    monkeypatch.setattr(uptime, "MAX_PAGE", 1)
    for by, key, keys in (("device", "device_id", ["=1+1", "b", "c"]), ("site", "site", ["a", "b", None])):
        rows: list[dict[str, Any]] = []
        answer = await fleet.read(by=by)
        while True:
            rows += answer["uptime"]
            if answer["next"] is None:
                break
            answer = await fleet.read(by=by, after=answer["next"])
        assert [row[key] for row in rows] == keys
        table = await fleet.csv(by=by)
        assert [row[key] for row in table] == [(each or "").replace("=1+1", "'=1+1") for each in keys]
        assert [float(row["heard_minutes"]) for row in table] == [row["heard_minutes"] for row in rows]
        assert all(59 < row["heard_minutes"] <= 60 for row in rows)
        assert [set(row) for row in table] == [set(row) for row in rows]
    assert len(await fleet.csv(by="fleet")) == 1
    assert [*await fleet.rows(tag="vip", limit=1)] == ["b"]
    assert [*await fleet.rows(device="=1+1")] == ["=1+1"]
    assert [*await fleet.rows(device="=1+1", tag="vip")] == []


async def test_bad_input_names_the_parameter(fleet: Fleet) -> None:
    unknown = ("site", "names no site that exists or existed: 'nowhere'")
    assert await fleet.refused(site="nowhere") == await fleet.refused(site="nowhere", format="csv") == unknown
    assert await fleet.refused(start="2016-01-01") == ("from", "must be at most 731 days before `to`")
    assert await fleet.refused(start=TODAY, end=TODAY) == ("to", "must be later than `from`")
    assert await fleet.refused(start=TODAY, end=TODAY - DAY) == ("to", "must be later than `from`")
    assert await fleet.refused(start=TODAY + 2 * DAY) == ("from", "must not be in the future")
    for bad in ("yesterday", "2026-02-30", "2026-11-24T00:00:00", ""):
        assert (await fleet.refused(start=bad))[0] == "from"
    assert await fleet.refused(by="planet") == ("by", "must be device, site or fleet")
    assert await fleet.refused(format="xml") == ("format", "must be json or csv")
    assert (await fleet.refused(limit=501))[0] == "limit"
    assert (await fleet.refused(limit=5, format="csv"))[0] == "limit"
    assert (await fleet.refused(after="a", by="fleet"))[0] == "after"
    assert "nobody" in (await fleet.nexhb.get(path(device="nobody"), 404))["detail"]


async def test_a_range_of_times_becomes_the_days_that_contain_it(fleet: Fleet) -> None:
    answer = await fleet.read(start=f"{TODAY - 3 * DAY}T17:00:00Z", end=f"{TODAY - DAY}T00:00:00Z")
    assert (answer["from"], answer["to"]) == (f"{TODAY - 3 * DAY}", f"{TODAY - DAY}")
    answer = await fleet.read(start=f"{TODAY - 3 * DAY}T00:00:00+01:00", end=f"{TODAY - DAY}T00:00:01Z")
    assert (answer["from"], answer["to"]) == (f"{TODAY - 4 * DAY}", f"{TODAY}")
    answer = await fleet.read(end="9999-12-31")
    assert (answer["from"], answer["to"]) == (f"{TODAY - 6 * DAY}", f"{TODAY + DAY}")


@pytest.fixture
def run(fleet: Fleet, tmp_path: Path) -> Run:
    """Return a function that runs `nexhb uptime` and returns the lines that it prints."""
    port = fleet.nexhb.url.rpartition(":")[2]
    env = {"NEXHB_SERVER__PORT": port, "ADMIN_KEY": ADMIN_KEY, "NEXHB_DATA_DIR": str(tmp_path), "PATH": ""}

    async def command(*arguments: str, code: int = 0) -> list[str]:
        done = await asyncio.to_thread(forks.run, "nexhb", ("uptime", *arguments), env=env, timeout=50)
        assert done.returncode == code, done.stderr
        return (done.stdout if code == 0 else done.stderr).splitlines()

    return command


async def test_the_command_shows_sites_devices_or_the_fleet(
    fleet: Fleet, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour_ago = NOON - DAY / 24
    for device_id, site in {"a": "store-42", "b": "store-42", "c": None}.items():
        await fleet.add(device_id, regular(hour_ago, NOON) if device_id != "b" else (), site, hour_ago)
    header, store = [line.split("\t") for line in await run("--site", "store-42", "--last", "7d")]
    assert header[:4] == ["site", "share", "days", "days_missing"]
    assert (store[0], store[1][:4], store[1][-2:], *store[2:4]) == ("store-42", "49.9", " %", "2", "0")
    monkeypatch.setattr(uptime, "MAX_PAGE", 2)
    assert [line.split("\t")[0] for line in await run()] == ["device_id", "a", "b", "c"]
    assert [line.split("\t")[0] for line in await run("--device", "b", "--from", f"{TODAY}")] == ["device_id", "b"]
    [answer] = [json.loads(line) for line in await run("--json")]
    monkeypatch.setattr(uptime, "MAX_PAGE", 500)
    assert answer == await fleet.read() | {"as_of": answer["as_of"]}
    table = [line.split(",") for line in await run("--csv", "--site", "store-42", "--by", "device")]
    assert [(row[0], row[2]) for row in table] == [("device_id", "site"), ("a", "store-42"), ("b", "store-42")]
    assert (await run("--by", "fleet"))[0].split("\t")[0] == "share"


async def test_the_command_names_what_is_wrong(run: Run) -> None:
    for arguments, message in (
        (("--site", "nowhere"), "site names no site that exists or existed: 'nowhere'."),
        (("--site", "nowhere", "--csv"), "site names no site that exists or existed: 'nowhere'."),
        (("--from", "2016-01-01"), "from must be at most 731 days before `to`."),
        (("--last", "12h"), "--last takes a number of days such as 7d."),
        (("--last", "7d", "--to", "2026-11-24"), "--last excludes --from and --to."),
        (("--csv", "--json"), "--csv and --json exclude each other."),
    ):
        assert await run(*arguments, code=cli.EXIT_USAGE) == [f"nexhb: The input is not valid. {message}"]
    [line] = await run("--device", "nobody", code=cli.EXIT_FAILED)
    assert line == "nexhb: The daemon refused the request. Device not found: 'nobody'."


async def test_a_table_that_breaks_off_is_an_error_of_the_command(
    fleet: Fleet, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device_id in ("a", "b"):
        await fleet.add(device_id, (), None, NOON - DAY / 24)
    monkeypatch.setattr(uptime, "MAX_PAGE", 1)
    by_device = UptimeReads.by_device

    async def failing(reads: UptimeReads, query: UptimeQuery, limit: int, after: str | None) -> UptimePage:
        if after is not None:
            raise DatabaseUnavailable("gone")
        return await by_device(reads, query, limit, after)

    monkeypatch.setattr(UptimeReads, "by_device", failing)
    [line] = await run("--csv", code=cli.EXIT_FAILED)
    assert line.startswith("nexhb: The daemon does not answer.")
