"""Uptimes: make the simulated days, and compare the uptime of each kiosk with the script.

Each edge may be wrong by an interval of the kiosk: what happens between two heartbeats is not known more precisely.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import pairwise

from bench.sim.script import AGENT, DAY, FLAT, HOUR, LINE, POWER, UNITY, Kiosk, Script, Truth
from nexhb import partitions
from nexhb.partitions import midnight
from nexhb.postgres.connections import Connection
from nexhb.watching import device_days
from nexhb.watching.device_days import DayTable, UptimeRules
from nexhb.watching.uptime import DayParts
from tests.support.watching_truth import WAIT, is_open

RULES = UptimeRules()
LATE = 600.0  # seconds: a heartbeat that arrives later was replayed
SLACK = 40.0  # seconds of each edge, beside the interval: the wait before a queue is sent, and rounding

Days = Mapping[tuple[int, float], DayParts]  # by kiosk and start of the day


async def make(conn: Connection, script: Script) -> Days:
    """Make the days of the script as the nightly run does, and the last one, which is not over, as a read does."""
    now, day = script.at(script.end), script.at(0).date()
    found: dict[tuple[int, float], DayParts] = {}
    while day < now.date():
        await device_days.make_due(conn, DayTable(day, partitions.table_name(day)), RULES, now)
        day += timedelta(days=1)
    columns = ", ".join(column for column in device_days.COLUMNS if column not in ("device_no", "day", "place_no"))
    for row in await conn.fetch(f"SELECT device_no, day, {columns} FROM device_days"):
        found[row[0], _start(midnight(row[1]), script)] = DayParts(*row[2:])
    rows = await conn.fetch("SELECT device_no, site, created_at, revoked_at FROM devices")
    devices = await device_days.placed(conn, day, rows)
    parts = await device_days.compute(conn, DayTable(day, "device_heartbeats"), devices, RULES, now)
    return found | {(number, _start(midnight(day), script)): each for number, each in parts.items()}


def compare_uptime(script: Script, days: Days) -> list[str]:
    """Return each difference in a sentence."""
    wrong = []
    starts = [_start(midnight(script.at(0).date()), script)]
    while starts[-1] + DAY < script.end:
        starts.append(starts[-1] + DAY)
    for kiosk in script.kiosks:
        for start in starts:
            found = days.get((kiosk.number, start))
            name = f"{script.at(start):%d} kiosk {kiosk.number}"
            if found is None:
                wrong.append(f"{name}: there is no uptime.")
            else:
                wrong += [f"{name}: {each}" for each in _differences(kiosk, script, start, found)]
    return wrong


def _differences(kiosk: Kiosk, script: Script, start: float, found: DayParts) -> list[str]:
    truth, end = _true_parts(kiosk, script, start), min(start + DAY, script.end)
    near = [each for each in kiosk.truths if each.end > start - kiosk.interval and each.start < end + kiosk.interval]
    downs = [(down, up) for down, up in script.ours if up > start - kiosk.interval and down < end + kiosk.interval]
    edge = kiosk.interval + SLACK

    def edges_s(*kinds: str) -> float:
        return 2 * edge * sum(each.kind in kinds for each in near)

    first = 2.5 * edge if start <= 0 else 0.0  # the first heartbeat comes after two intervals
    ours = 2 * SLACK * len(downs)
    # After an outage of ours, live heartbeats may count as replayed; on a line that was down for hardly longer than
    # LATE, replayed ones as heard.
    moved = sum(WAIT + edge for _ in downs) + sum(
        each.end - each.start for each in near if each.kind == LINE and each.end - each.start < LATE + 2 * edge
    )
    replayed = edges_s(LINE, AGENT, POWER, FLAT) + ours + moved
    up = edges_s(POWER, FLAT) + ours + first
    allowed = {
        "closed": 0.0, "ours": ours, "heard": replayed + first, "replayed": replayed,
        "off": edges_s(POWER, FLAT) + ours, "unknown": first, "unity": up + edges_s(UNITY, AGENT), "up": up,
    }  # fmt: skip
    pairs = {part: (getattr(found, part) * 6, truth[part]) for part in DayParts._fields[:7]}
    pairs["up"] = ((found.heard + found.replayed) * 6, truth["heard"] + truth["replayed"])
    # If about half of the heartbeats were replayed, their delay counts in part as the skew of the clock.
    queued = sum(min(up, end) - max(down, start, 0.0) for down, up in downs)
    queued += sum(each.end - each.start for each in near if each.kind == LINE)
    slack = SLACK if queued < 0.4 * (end - max(start, 0.0)) else LATE
    wrong = [
        f"{part} is {is_s / 60:.1f} minutes, not {right_s / 60:.1f}."
        for part, (is_s, right_s) in pairs.items() if abs(is_s - right_s) > allowed[part] + slack
    ]  # fmt: skip
    boots = [each.end for each in near if each.kind in (POWER, FLAT)]
    edges = sum(abs(boot - at) < edge for boot in boots for at in (start, end))
    reboots = sum(start <= boot < end for boot in boots)
    return wrong + [f"{found.reboots} reboots, not {reboots}."] * (abs(found.reboots - reboots) > edges)


def _true_parts(kiosk: Kiosk, script: Script, start: float) -> dict[str, float]:
    """Return the seconds of each part of the day."""
    begin, end = max(start, 0.0), min(start + DAY, script.end)
    moments = {begin, end, *(start + hour * HOUR for hour in range(24))}  # sites open and close on the hour
    moments |= {at for each in kiosk.truths for at in (each.start, each.end)}
    moments |= {at for span in script.ours for at in span}
    edges = sorted(at for at in moments if begin <= at <= end)
    parts = dict.fromkeys(DayParts._fields[:7], 0.0)
    for at, until in pairwise(edges):
        part = _part(kiosk, script, (at + until) / 2)
        parts[part] += until - at
        now = kiosk.truth((at + until) / 2, UNITY, AGENT)
        parts["unity"] += (until - at) * (part in ("heard", "replayed") and now is None)
    return parts


def _part(kiosk: Kiosk, script: Script, t: float) -> str:
    now: Truth | None = kiosk.truth(t, POWER, FLAT, LINE, AGENT)
    if not is_open(kiosk, t, script):
        return "closed"
    if any(down <= t < up for down, up in script.ours):
        return "ours"
    if now is None or (now.kind == LINE and now.end - now.start < LATE):
        return "heard"
    return "off" if now.kind in (POWER, FLAT) else "replayed"


def _start(at: datetime, script: Script) -> float:
    return (at - script.start).total_seconds()
