"""The load generator against small servers: its counts and records are correct, and no response delays its sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench.__main__ import main as bench
from bench.cost import cost_now, process_cpu_s, tree_cpu_s
from bench.fleet import BUCKET_US, Replay, Schedule, make_fleet, replays, schedule
from bench.load import (
    Backoff,
    Keys,
    LoadRun,
    Scheduled,
    Spliced,
    Target,
    agents,
    due_times,
    stream,
    target,
)
from bench.load.connection import parse_head
from bench.load.sender import Alarm
from bench.report import Limit, Outcome, SendLog, judge, percentiles
from tests.conftest import SOON_S

FLEET = make_fleet(20, seed=5)
NUMBER_OF_TOKEN = {device.token: device.index for device in FLEET}
OK = b'{"ok":true,"next_heartbeat_seconds":60,"deduplicated":false}'
SOON = Backoff(base_s=0.01, cap_s=0.05)

# ── servers ──────────────────────────────────────────────────────────────────────────────────────────────


def answer(status: str = "200 OK", body: bytes = OK, extra: str = "") -> bytes:
    """Return a plain HTTP response."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


# Return the bytes to write for request number n (from 0), b"" for none, and False to close the connection afterwards.
Script = Callable[[int], Awaitable[tuple[bytes, bool]]]


@contextlib.asynccontextmanager
async def raw_server(script: Script) -> AsyncIterator[Target]:
    """Run a server that reads requests and writes whatever bytes the script returns."""
    number, writers = 0, set[asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):  # the request with which a connection is opened
                    writer.write(answer("404 Not Found", b""))
                    continue
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                number += 1
                raw, stay = await script(number - 1)
                writer.write(raw)
                if not stay:
                    break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()
        await asyncio.gather(*(w.wait_closed() for w in writers), return_exceptions=True)


class Daemon:
    """A server that responds like the daemon: it stores one heartbeat per device and bucket; others are duplicates."""

    def __init__(self) -> None:
        self.received: list[tuple[int, str]] = []
        self.rows: set[tuple[int, str]] = set()
        self.deduplicated = 0
        # Called before a heartbeat is stored; a response other than None is returned instead.
        self.refuse: Callable[[int], web.Response | None] = lambda _: None
        self.slow_s = 0.0

    async def heartbeat(self, request: web.Request) -> web.Response:
        """Handle the only route."""
        device = NUMBER_OF_TOKEN[request.headers["Authorization"].removeprefix("Bearer ")]
        found = json.loads(await request.read())
        assert found["device_id"] == FLEET[device].device_id
        self.received.append((device, found["timestamp_utc"]))
        if self.slow_s:
            await asyncio.sleep(self.slow_s)
        if (refusal := self.refuse(device)) is not None:
            return refusal
        # 2026-11-24T02:00:0|0.123456Z: the time up to the tens of seconds is the bucket.
        row = (device, found["timestamp_utc"][:18])
        again = row in self.rows
        self.rows.add(row)
        self.deduplicated += again
        return web.Response(body=OK.replace(b"false", b"true") if again else OK)


@contextlib.asynccontextmanager
async def daemon_server(daemon: Daemon) -> AsyncIterator[Target]:
    """Run the stand-in daemon on a free port."""
    app = web.Application()
    app.router.add_post("/v1/heartbeat", daemon.heartbeat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Target("127.0.0.1", runner.addresses[0][1])
    finally:
        await runner.cleanup()


def plan_of(*sends: tuple[int, int]) -> Schedule:
    """Return a schedule of these sends: (offset in ms, device)."""
    return Schedule(
        duration_s=0.1,
        offset_us=array("q", [ms * 1000 for ms, _ in sends]),
        device=array("i", [device for _, device in sends]),
    )


async def send(to: Target, plan: Schedule, **options: Any) -> LoadRun:
    """Run an open loop."""
    options = {"timeout_s": 5.0, "duration_s": 0.0} | options
    return await stream(to, Scheduled(to, FLEET, plan), plan.offset_us, **options)


async def closed(to: Target, connections: int, duration_s: float) -> LoadRun:
    """Run a closed loop."""
    requests = Spliced(to, FLEET, Keys(20_000, len(FLEET)).holding(20_000))
    return await stream(to, requests, connections=connections, duration_s=duration_s, warm_s=0.1)


async def flood(to: Target, *stages: tuple[float, float], connections: int, timeout_s: float = 30.0) -> LoadRun:
    """Send at a rate, and hold back the requests for which no connection is free."""
    requests, duration_s = Spliced(to, FLEET, Keys(400, len(FLEET)).holding(400)), sum(each[1] for each in stages)
    options: dict[str, Any] = {"connections": connections, "timeout_s": timeout_s, "duration_s": duration_s}
    return await stream(to, requests, due_times(*stages), hold_back=True, **options)


def add_up(run: LoadRun) -> None:
    """Assert what holds for every run: its counts add up."""
    result = run.result
    assert result.sent == result.ok + result.refused + result.failed
    assert result.refused == sum(n for status, n in result.statuses.items() if not status.startswith("2"))
    assert result.failed == sum(result.failures.values())


def buckets(sends: SendLog) -> set[tuple[int, int]]:
    """Return the (device, bucket) pairs that were sent."""
    return {(device, ts_us // BUCKET_US) for device, ts_us in zip(sends.device, sends.ts_us, strict=True)}


# ── open loop ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_late_answer_counts_in_full_and_delays_no_other_send() -> None:
    all_here = asyncio.Event()

    async def late_first(number: int) -> tuple[bytes, bool]:
        if number == 4:
            all_here.set()
        if number == 0:
            # This response comes 300 ms after every later send has arrived, so that none of them waited for it.
            await all_here.wait()
            await asyncio.sleep(0.3)
        return answer(), True

    async with raw_server(late_first) as to:
        run = await send(to, plan_of((0, 0), (10, 0), (15, 1), (20, 0), (30, 2)))
    assert run.result.ok == 5
    assert run.sends.latency_s[0] >= 0.3
    assert max(run.sends.latency_s[1:]) < run.sends.latency_s[0]
    assert run.result.max_ms is not None
    assert run.result.max_ms >= 300
    add_up(run)


async def test_a_send_that_waits_for_its_connection_counts_from_its_intended_time() -> None:
    async def late_first(number: int) -> tuple[bytes, bool]:
        await asyncio.sleep(0.3 if number == 0 else 0)
        return answer(), True

    async with raw_server(late_first) as to:
        run = await send(to, plan_of((0, 0), (20, 1)), connections=1)
    assert run.result.connections_opened == 1
    assert run.sends.latency_s[0] >= 0.3
    # The server responded at once, but the request had been due 280 ms before it was sent.
    assert run.sends.latency_s[1] >= 0.28


@pytest.mark.parametrize(
    ("raw", "stay", "reason"),
    [
        (b"", False, "closed"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", True, "garbage"),
        (b"HTTP/1.1 abc\r\n\r\n", True, "garbage"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", False, "closed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", True, "garbage"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", True, "garbage"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", True, "garbage"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, True, "garbage"),
        (b"", True, "timeout"),
    ],
)
async def test_an_answer_that_cannot_be_read_is_a_failure_with_its_reason(raw: bytes, stay: bool, reason: str) -> None:
    async def script(_: int) -> tuple[bytes, bool]:
        return raw, stay

    async with raw_server(script) as to:
        run = await send(to, plan_of((0, 0), (1, 1), (2, 0)), timeout_s=0.2 if reason == "timeout" else 5)
    assert run.result.failures == {reason: 3}
    assert run.result.p99_ms is None
    assert set(run.sends.outcome) == {Outcome.FAILED}
    add_up(run)


async def test_answers_other_than_2xx_are_refusals_counted_by_status() -> None:
    statuses = [
        "503 Service Unavailable",
        "429 Too Many Requests",
        "500 Oops",
        "401 Unauthorized",
        "201 Created",
    ]

    async def script(number: int) -> tuple[bytes, bool]:
        return answer(statuses[number], b"{}", "Retry-After: 1\r\n"), True

    async with raw_server(script) as to:
        run = await send(to, plan_of(*((10 * n, n) for n in range(5))))
    assert run.result.statuses == {"201": 1, "401": 1, "429": 1, "500": 1, "503": 1}
    assert (run.result.ok, run.result.refused, run.result.failed) == (1, 4, 0)
    assert run.sends.count(Outcome.REFUSED) == 4
    add_up(run)


async def test_nobody_listening_is_a_failure_of_each_send() -> None:
    async with raw_server(lambda _: asyncio.sleep(0, (b"", False))) as to:
        pass
    run = await send(to, plan_of((0, 0), (5, 0), (9, 3)))
    assert run.result.failures == {"connect Connection refused": 3}
    add_up(run)


async def test_a_server_that_closes_after_each_answer_gets_a_new_connection_each_time() -> None:
    async def script(_: int) -> tuple[bytes, bool]:
        return answer(extra="Connection: close\r\n"), False

    async with raw_server(script) as to:
        run = await send(to, plan_of(*((20 * n, 0) for n in range(5))))
    assert run.result.ok == 5
    assert run.result.connections_opened >= len(FLEET)


async def test_an_answer_may_come_in_pieces() -> None:
    whole = answer(body=b'{"ok": true, "deduplicated": true}')

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"POST"):
                    await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
                for at in range(len(whole)):
                    writer.write(whole[at : at + 1])
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        run = await send(Target("127.0.0.1", server.sockets[0].getsockname()[1]), plan_of((0, 0)))
    assert (run.result.ok, run.result.deduplicated, run.result.failed) == (1, 1, 0)


async def test_a_load_that_is_told_to_end_counts_what_was_sent_by_then() -> None:
    done, seen = asyncio.Event(), 0

    async def ends_after_three(number: int) -> tuple[bytes, bool]:
        nonlocal seen
        seen = number + 1
        if seen == 3:
            done.set()
        return answer(), True

    plan = plan_of(*((100 * n, n % len(FLEET)) for n in range(1_200)))
    async with raw_server(ends_after_three) as to:
        run = await send(to, plan, until=done)
    assert 3 <= run.result.sent == run.result.ok == seen < 1_000
    assert time.time() - SOON_S * 2 < run.began_at_s < time.time()
    add_up(run)


async def test_a_connection_that_is_opened_beforehand_has_asked_for_something_and_it_counts_as_no_send() -> None:
    daemon = Daemon()
    async with daemon_server(daemon) as to:
        run = await send(to, plan_of((0, 0), (10, 1)))
    # Each connection received a 404, and is used nevertheless.
    assert (run.result.sent, run.result.ok, run.result.statuses) == (2, 2, {"200": 2})
    assert run.result.connections_opened == len(FLEET)
    add_up(run)


async def test_a_greeting_without_an_answer_holds_up_the_start_no_longer_than_the_timeout() -> None:
    async def only_posts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"POST"):
                    await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
                    writer.write(answer())
        writer.close()

    server = await asyncio.start_server(only_posts, "127.0.0.1", 0)
    async with server:
        to = Target("127.0.0.1", server.sockets[0].getsockname()[1])
        run = await send(to, plan_of((0, 0), (10, 1)), timeout_s=0.3)
    assert run.result.ok == 2
    add_up(run)


async def test_what_is_recorded_is_what_the_server_got() -> None:
    daemon = Daemon()
    plan = schedule(20, 1, 0.2, 1, seed=2, duplicate_factor=3)
    async with daemon_server(daemon) as to:
        run = await send(to, plan)
    assert run.result.sent == run.result.ok == len(run.sends) == len(daemon.received) == len(plan)
    assert Counter(run.sends.device) == Counter(device for device, _ in daemon.received)
    assert run.result.deduplicated == run.sends.count(Outcome.DEDUPLICATED) == daemon.deduplicated > 0
    assert len(buckets(run.sends)) == len(daemon.rows)
    assert not any(math.isnan(latency) for latency in run.sends.latency_s)
    add_up(run)


async def test_the_alarm_rings_at_its_time() -> None:
    alarm = Alarm()
    for ahead_s in (0.002, 0.0005, -1):
        at_s = time.monotonic() + ahead_s
        await alarm.until(at_s)
        assert time.monotonic() >= at_s - 0.001
    alarm.close()


# ── agents ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_agents_drain_their_queues_oldest_first_and_repeat_what_was_refused() -> None:
    daemon, refusals = Daemon(), Counter[int]()

    def refuse_twice(device: int) -> web.Response | None:
        refusals[device] += 1
        return web.Response(status=503, headers={"Retry-After": "0"}) if refusals[device] <= 2 else None

    daemon.refuse = refuse_twice
    async with daemon_server(daemon) as to:
        run = await agents(to, FLEET, queues=replays(20, 60, 6, 0.05, seed=1), bound_s=10, backoff=SOON)
    for device in range(20):
        stamps = [stamp for number, stamp in daemon.received if number == device]
        assert stamps[0] == stamps[1] == stamps[2]
        assert len(set(stamps)) == 6
        assert stamps == sorted(stamps)
    assert run.result.statuses == {"200": 120, "503": 40}
    assert run.result.ok == len(run.sends) == 120
    assert run.result.extra["left"] == 0
    add_up(run)


async def test_agents_keep_heartbeats_through_lost_connections() -> None:
    async def every_third_dies(number: int) -> tuple[bytes, bool]:
        return (b"", False) if number % 3 == 0 else (answer(), True)

    async with raw_server(every_third_dies) as to:
        run = await agents(to, FLEET, plan=schedule(20, 0.1, 0, 0.5, seed=1), bound_s=10, backoff=SOON)
    assert run.result.failures.keys() == {"closed"}
    assert run.result.ok == len(run.sends) == 100
    add_up(run)


async def test_agents_stop_at_the_bound_and_say_what_is_left() -> None:
    async def silent(_: int) -> tuple[bytes, bool]:
        return b"", True

    async with raw_server(silent) as to:
        run = await agents(to, FLEET, queues=replays(4, 60, 3, 0.01, seed=1), bound_s=0.2, timeout_s=5)
    assert run.result.extra["left"] == 12
    assert run.result.failures == {"bound": 4}
    add_up(run)


async def test_an_answer_that_never_comes_is_cut_and_asked_for_again() -> None:
    async def silent_once(number: int) -> tuple[bytes, bool]:
        return (b"", True) if number == 0 else (answer(), True)

    async with raw_server(silent_once) as to:
        run = await agents(to, FLEET, queues=replays(1, 60, 2, 0.01, seed=1), bound_s=5, timeout_s=0.2, backoff=SOON)
    assert (run.result.failures, run.result.ok) == ({"timeout": 1}, 2)
    assert run.sends.latency_s[0] >= 0.2


async def test_an_agents_queue_is_bounded_and_gives_up_the_oldest() -> None:
    async def script(_: int) -> tuple[bytes, bool]:
        return answer(), True

    full = (Replay(device=0, start_us=0, made_us=tuple(range(-505 * BUCKET_US, 0, BUCKET_US))),)
    async with raw_server(script) as to:
        run = await agents(to, FLEET, queues=full, bound_s=10)
    assert (run.result.extra["dropped"], run.result.ok) == (5, 500)
    assert list(run.sends.outcome[:6]) == [Outcome.PENDING] * 5 + [Outcome.WRITTEN]


def test_the_backoff_doubles_to_its_cap_and_yields_to_a_longer_retry_after() -> None:
    class Middle(random.Random):
        def random(self) -> float:
            return 0.5

    rng = Middle()
    delays = [Backoff().delay_s(attempt, 0.0, rng) for attempt in (0, 1, 2, 20, 5000)]
    assert delays == [2.25, 4.5, 9.0, 337.5, 337.5]
    assert Backoff().delay_s(0, 7.0, rng) == 7.0
    assert Backoff().delay_s(3, 7.0, rng) == 18.0


# ── closed loop ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_closed_loop_sends_nothing_twice_and_records_everything() -> None:
    daemon = Daemon()
    async with daemon_server(daemon) as to:
        run = await closed(to, 4, 0.4)
    assert run.result.sent == run.result.ok == len(run.sends) == len(daemon.received) > 100
    assert run.result.deduplicated == daemon.deduplicated == 0
    assert len(buckets(run.sends)) == len(run.sends)
    assert run.result.rate_per_s > 0
    add_up(run)


async def test_a_closed_loop_survives_a_server_that_closes_and_refuses() -> None:
    async def script(number: int) -> tuple[bytes, bool]:
        return ((b"", False), (answer("503 No", b""), True), (answer(), True))[number % 3]

    async with raw_server(script) as to:
        run = await closed(to, 3, 0.4)
    assert run.result.failures.keys() == {"closed"}
    assert run.result.statuses.keys() == {"200", "503"}
    add_up(run)


async def test_a_closed_loop_waits_for_the_last_answers() -> None:
    async def script(number: int) -> tuple[bytes, bool]:
        if number == 0:
            return answer(extra="Connection: close\r\n"), False
        await asyncio.sleep(0.3)
        return answer(), True

    async with raw_server(script) as to:
        run = await closed(to, 1, 0.2)
    assert (run.result.sent, run.result.ok) == (2, 2)
    assert list(run.sends.outcome) == [Outcome.WRITTEN] * 2


# ── command line, report ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.1:8080", "http://example.org", "http://127.0.0.1@example.org/", "http://[2001:db8::1]/"],
)
def test_only_loopback_is_loaded(url: str) -> None:
    with pytest.raises(ValueError, match="not a loopback address"):
        target(url)
    with pytest.raises(SystemExit) as left:
        bench(["load", "--url", url])
    assert left.value.code == 2


def test_loopback_addresses_are_taken() -> None:
    assert target("http://localhost:8080/") == Target("127.0.0.1", 8080)
    assert target("http://127.3.2.1") == Target("127.3.2.1", 80)
    assert target("http://127.0.0.1:81/base/v1/heartbeat") == Target("127.0.0.1", 81, "/base/v1/heartbeat")
    with pytest.raises(ValueError, match="is not an http:// URL"):
        target("https://127.0.0.1")


async def test_a_flood_sends_at_its_rates_and_keeps_the_latency_of_refusals_too() -> None:
    daemon = Daemon()
    daemon.refuse = lambda device: None if device % 4 else web.Response(status=503)
    async with daemon_server(daemon) as to:
        run = await flood(to, (50, 0.2), (400, 0.5), connections=20)
    assert run.result.sent == len(run.sends) == len(daemon.received)
    # On a busy machine, a send may be held back because every connection waits for a response.
    assert run.result.sent + (run.result.extra["held_back"] or 0) == 210
    assert run.result.statuses == {"200": run.result.ok, "503": run.result.refused}
    assert all(0 < latency < 5 for latency in run.sends.latency_s)
    assert len(run.sends.latencies(Outcome.REFUSED)) == run.result.refused > 0
    add_up(run)


async def test_a_flood_counts_what_no_connection_was_free_for() -> None:
    daemon = Daemon()
    async with daemon_server(daemon) as to:
        daemon.slow_s = 0.3
        run = await flood(to, (500, 0.5), connections=2)
    assert run.result.ok == len(run.sends) <= 6
    assert run.result.extra["held_back"] == 250 - len(run.sends)


async def test_a_flood_fails_what_is_not_answered() -> None:
    daemon = Daemon()
    async with daemon_server(daemon) as to:
        daemon.slow_s = 1.0
        run = await flood(to, (20, 0.2), connections=4, timeout_s=0.3)
    assert run.result.failures == {"timeout": 4}
    assert set(run.sends.outcome) == {Outcome.FAILED}


async def test_the_load_command_writes_the_contracts_json_and_exits_by_its_verdicts(tmp_path: Path) -> None:
    csv, out = tmp_path / "fleet.csv", tmp_path / "results" / "load.json"
    assert bench(["fleet", "--devices", "20", "--out", str(csv), "--seed", "5"]) == 0
    assert csv.stat().st_mode & 0o077 == 0
    assert csv.read_text(encoding="utf-8").splitlines()[1].startswith(FLEET[0].device_id)
    daemon = Daemon()
    options = ["--devices", "20", "--interval", "0.5", "--jitter", "0", "--duration", "0.5", "--json", str(out)]
    async with daemon_server(daemon) as to:
        given = ["load", "--url", f"http://127.0.0.1:{to.port}", "--seed", "5", *options]
        kept = await asyncio.to_thread(bench, given)
        found = json.loads(out.read_text())
        daemon.refuse = lambda _: web.Response(status=503)
        broken = await asyncio.to_thread(bench, given)
    assert (kept, broken) == (0, 1)
    wanted = "sent ok refused failed deduplicated p50_ms p95_ms p99_ms max_ms rate_per_s verdicts"
    assert set(wanted.split()) <= found.keys()
    assert found["sent"] == found["ok"] == 20
    assert found["verdicts"][0] == {
        "name": "nothing refused",
        "limit": 0,
        "value": 0,
        "ok": True,
        "kind": "at_most",
    }
    assert [path.name for path in out.parent.iterdir()] == ["load.json"]


def test_percentiles_are_those_of_the_values() -> None:
    values = [n / 1e6 for n in range(1, 100_001)]
    found = percentiles(values)
    assert found.p50_ms == pytest.approx(50, rel=0.002)
    assert found.p99_ms == pytest.approx(99, rel=0.002)
    assert found.max_ms == 100
    assert percentiles([]).p99_ms is None


async def test_a_limit_is_broken_by_a_value_that_was_never_measured() -> None:
    async with raw_server(lambda _: asyncio.sleep(0, (b"", False))) as to:
        run = await send(to, plan_of((0, 0)))
    judged = judge(run.result, [Limit("fast", "p99_ms", 10), Limit("sent", "sent", 1, "at_least")])
    assert [(verdict.value, verdict.ok) for verdict in judged.verdicts] == [(None, False), (1, True)]


def test_cpu_time_is_read_of_a_process_and_of_its_tree() -> None:
    assert cost_now((1,)).since(cost_now((1,))).generator_s >= -1
    assert tree_cpu_s(1) >= process_cpu_s(1) >= 0
    assert math.isnan(process_cpu_s(2**22 + 1))
    assert math.isnan(tree_cpu_s(2**22 + 1))


def test_a_head_is_read_whatever_its_case() -> None:
    head = parse_head(b"HTTP/1.1 503 Busy\r\nCONTENT-LENGTH: 5\r\nretry-after: 12\r\nConnection: close")
    assert head == (503, 5, True, 12.0)
    assert parse_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked") is None
