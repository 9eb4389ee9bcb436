"""Adopt the state of the fleet as it is, without events and messages: in the first round of a database, and whenever
the database may not be the one that the last round saw."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from nexhb import log
from nexhb.devices.presence import Presence
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.watching import rounds, state
from nexhb.watching.judging import Rules
from nexhb.watching.state import Habits

_Q = sql.queries("watching")
_log = log.get("watch")

RULES = 1  # increased by a version whose states mean something else
PAGE = 20_000  # devices of one statement


async def adopt_if_needed(conn: Connection, rules: Rules, presence: Presence, *, replaced: bool) -> None:
    """Take the state of every device as it is, unless the last round may be continued. Open incidents end without a
    message. `replaced`: the daemon has noticed that its database was replaced."""
    database = await conn.fetchval(_Q["database"])
    reason = "the database was replaced" if replaced else await _reason(conn, database)
    if not reason:
        return
    async with conn.transaction():
        await conn.execute(_Q["forget_state"], presence.now)
        position, judged = 0, 0
        while end := await conn.fetchval(_Q["page_end"], position, PAGE):
            judged += await _adopt_page(conn, (position, end), rules, presence)
            position = end
            await asyncio.sleep(0)
        await conn.execute(_Q["adopted"], database, RULES, presence.now)
    _log.info("watch.adopted", reason=reason, judged=judged)


async def _reason(conn: Connection, database: str) -> str:
    row = await conn.fetchrow(_Q["watch"])
    if row is None:
        return "this is the first round"
    if row["database"] != database:
        return "the database is a copy of the one that the last round saw"
    if row["rules"] != RULES:
        return "the rules have changed"
    return "the database is an older copy" if row["older_copy"] else ""


async def _adopt_page(conn: Connection, page: tuple[int, int], rules: Rules, presence: Presence) -> int:
    """Adopt a page of devices: one statement for those that are heard as usual; the others are judged one by one.
    Return the number of these others."""
    silent = presence.silent_for(rules.shortest_offline_after)
    tagged = [row["device_no"] for row in await conn.fetch(_Q["tagged"], *page, list(rules.by_tag))]
    condition = (*page, silent.before, silent.multirange, rules.shortest_offline_after, tagged)
    await conn.execute(_Q["adopt_ordinary"], *condition, rules.thresholds.battery_low_pct)
    rows = await conn.fetch(_Q["to_judge"], *condition)
    for start in range(0, len(rows), rounds.GROUP):
        await _adopt(conn, rows[start : start + rounds.GROUP], rules, presence)
    return len(rows)


async def _adopt(conn: Connection, rows: Sequence[Any], rules: Rules, presence: Presence) -> None:
    numbers = [row["device_no"] for row in rows]
    tags = {row["device_no"]: row["tags"] for row in await conn.fetch(_Q["devices"], numbers)}
    default = Habits(rules.interval, timedelta(0))
    learned = await rounds.learned_habits(conn, dict.fromkeys(numbers, default), presence.now)
    states = [
        state.adopted_state(
            row["device_no"], rounds.content_of(row), presence, learned.get(row["device_no"], default),
            rules.of(tags.get(row["device_no"], ())),
        )
        for row in rows
    ]  # fmt: skip
    await rounds.write_states(conn, {}, states)
