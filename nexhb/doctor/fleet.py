"""Checks of how the fleet is read and understood: flags, tokens, NexMDM, the time after which a device is offline."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from nexhb.devices.hours import Hours
from nexhb.doctor.check import CheckContext, CheckResult, shown_time
from nexhb.errors import BadInput
from nexhb.jobs.runner import MAX_CLOCK_DIFFERENCE
from nexhb.nexmdm import source as sources
from nexhb.postgres import sql
from nexhb.reading import comparison, flags
from nexhb.texts import shown

_Q = sql.queries("doctor")

MISMATCHES_WITHIN = timedelta(hours=24)
SHARED_WITHIN = timedelta(hours=24)
SOURCE_TIMEOUT_S = 5.0
MAX_NAMED = 10  # devices
MESSAGE_LATE = timedelta(minutes=5)
GIVEN_UP_WITHIN = timedelta(hours=24)
MAX_ERROR = 240  # characters


async def feature_flags(context: CheckContext) -> CheckResult:
    """Check that the fast reads are trusted, and that the configured flags are in force."""
    first = flags.first_values(context.settings.reads)
    now = await flags.read(context.conn, first)
    detail = (
        f"fast reads {f'for {now.rollout_percent} %' if now.read_from_last_status else 'off'}, "
        f"perf_diff {'on' if now.perf_diff else 'off'}"
    )
    remedy = "nexhb perf-diff report; nexhb reconcile, or nexhb backfill; then nexhb flags set read_from_last_status=on"
    if off := await context.conn.fetchval(_Q["turned_off"]):
        return CheckResult(
            "flags", False, f"perf_diff turned the fast reads off {shown_time(off)}: their results differed", remedy
        )
    if wrong := await comparison.count_mismatches(
        context.conn, context.now - MISMATCHES_WITHIN, context.now + MAX_CLOCK_DIFFERENCE
    ):
        return CheckResult("flags", False, f"{detail}; {wrong} comparisons of the last day differ", remedy)
    # An operator may believe that the configured value is in force. If the value is only the default, a switched flag
    # is no surprise.
    flag_names = {"from_last_status": "read_from_last_status"}
    for key in sorted(context.settings.reads.model_fields_set & {"from_last_status", "rollout_percent", "perf_diff"}):
        flag = flag_names.get(key, key)
        configured, current = first.shown()[flag], now.shown()[flag]
        if configured != current:
            return CheckResult(
                "flags", False, f"{detail}; the configured reads.{key} = {str(configured).lower()} is not in force: "
                f"it is only the initial value, and {flag} was switched to {str(current).lower()} since",
                f"remove reads.{key}, or nexhb flags set {flag}={str(configured).lower()}",
            )  # fmt: skip
    return CheckResult("flags", True, detail)


async def shared_tokens(context: CheckContext) -> CheckResult:
    """Check that no two kiosks use one token."""
    rows = await context.conn.fetch(_Q["shared_tokens"], context.now - SHARED_WITHIN)
    if not rows:
        return CheckResult("shared tokens", True, "no two kiosks used one token within a day")
    named = ", ".join(shown(row["device_id"]) for row in rows[:MAX_NAMED]) + (", …" if len(rows) > MAX_NAMED else "")
    detail = f"{len(rows)} tokens are used by two kiosks each: {named}"
    return CheckResult("shared tokens", False, detail, "docs/runbook.md#a-token-in-two-kiosks")


async def nexmdm(context: CheckContext) -> CheckResult:
    """Check that nexhb learns of devices that enrol at NexMDM; else report since when it does not."""
    source = context.settings.legacy.source
    if source is None:
        run = await context.conn.fetchrow(_Q["last_good"], "import", context.now + MAX_CLOCK_DIFFERENCE)
        assert run is not None  # noqa: S101 - a SELECT without FROM has one row
        if run["good"] is None:
            return CheckResult("NexMDM", True, "nothing was imported, and legacy.source is not set")
        detail = (
            f"legacy.source is not set, and the last import was {shown_time(run['good'])}: a device that enrolled at "
            "NexMDM since then receives 401 until the next import, and erases its credentials with its third "
            "heartbeat, which is 20 minutes at the agent's 600 s"
        )
        return CheckResult("NexMDM", True, detail)
    remedy = "docs/moving.md#devices-that-enrol-at-nexmdm; unset legacy.source once NexMDM is turned off"
    try:
        opening = sources.opened(
            source.get_secret_value(),
            name="legacy.source",
            application="nexhb look-up",
            timeout_s=SOURCE_TIMEOUT_S,
            for_history=False,
        )
        async with asyncio.timeout(SOURCE_TIMEOUT_S), opening as nexmdm:
            state = await nexmdm.state()
    except Exception as error:
        failure = error or type(error).__name__
        detail = f"legacy.source cannot be queried, so requests with unknown tokens receive 503: {failure}"
        return CheckResult("NexMDM", False, detail, remedy)
    detail = f"tokens that nexhb does not know are looked up in {nexmdm.name}"
    if state.is_standby:
        detail += (
            f", a standby that has replayed commits up to {shown_time(state.replayed)}: "
            "a token counts as unknown only once the standby has replayed a commit made a minute later"
        )
    return CheckResult("NexMDM", True, detail)


async def offline_after(context: CheckContext) -> CheckResult:
    """Check that devices are not counted as offline too early."""
    settings = context.settings.heartbeat
    detail = (
        f"offline after {settings.offline_after_seconds} s of silence, at an interval of {settings.interval_seconds} s"
    )
    return CheckResult("offline after", not settings.doubt(), settings.doubt() or detail, settings.remedy())


async def opening_hours(context: CheckContext) -> CheckResult:
    """Check that the hours of all sites and silences can be read."""
    rows = await context.conn.fetch(_Q["opening_hours"], context.now)
    unreadable = [row["whose"] for row in rows if not await asyncio.to_thread(_can_be_read, row["hours"], row["zone"])]
    if not unreadable:
        return CheckResult("opening hours", True, f"{len(rows)} sites and silences have hours")
    named = ", ".join(map(shown, unreadable[:MAX_NAMED])) + (", …" if len(unreadable) > MAX_NAMED else "")
    detail = f"the hours of {named} cannot be read: such a site counts as always open, such a silence as never in force"
    return CheckResult("opening hours", False, detail, "nexhb sites set SITE --hours …; nexhb silence remove NUMBER")


def _can_be_read(hours: str, zone: str) -> bool:
    try:
        Hours.parse(hours, zone)
    except BadInput:
        return False
    return True


async def messages(context: CheckContext) -> CheckResult:
    """Check that messages about incidents are delivered. An installation without a route is good: its operators may use
    Prometheus' alerts."""
    routes = context.settings.notify.routes
    late, given_up = context.now - MESSAGE_LATE, context.now - GIVEN_UP_WITHIN
    failing = [
        f"{shown(row['route'])}: {row['waiting']} wait since {shown_time(row['since'])}, {row['given_up']} given up"
        + (f": {shown(row['error'])[:MAX_ERROR]}" if row["error"] else "")
        for row in await context.conn.fetch(_Q["failing_messages"], late, given_up)
    ]
    if failing:
        remedy = "nexhb notify test ROUTE; docs/runbook.md#nexhbnotificationsfailing"
        return CheckResult("messages", False, "; ".join(failing), remedy)
    if not routes:
        return CheckResult("messages", True, "notify.routes has no route: no messages about incidents are sent")
    names = ", ".join(route.name for route in routes)
    own = (
        ""
        if any(route.self for route in routes)
        else "; none has self = true: no messages about nexhb's own outages are sent"
    )
    return CheckResult("messages", True, f"routes: {names}{own}")
