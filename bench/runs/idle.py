"""`python -m bench idle`: ten thousand connections that say nothing, beside a fleet that does not notice them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Final, cast

import typer
import uvloop

from bench import progress, stack, suite
from bench.finding import Finding, of_trial
from bench.fleet import Device, make_fleet, schedule
from bench.load import Target, open_loop, target
from bench.load.target import raise_open_files
from bench.report import hold
from bench.scenarios import IDLE, KEPT_FOR, IdleScenario
from bench.trial import Trial, examine
from nexhb.daemon import KEEPALIVE_S, OWN_FILES

_SEED: Final = 1
# so many at once: the kernel's backlog is the daemon's 4,096
_AT_ONCE: Final = 500
_ANSWER_S: Final = 30.0
# the allocator and the loop are at rest
_SETTLE_S: Final = 2.0
_MARGIN_S: Final = 10.0


def idle(
    connections: Annotated[int, typer.Option(min=2, help="How many say nothing.")] = IDLE.connections,
    seconds: Annotated[float, typer.Option(min=1, help="How long the fleet sends beside them.")] = IDLE.duration_s,
    wait: Annotated[bool, typer.Option(help="Wait until the keep-alive's end, to see each closed.")] = True,
    out: Annotated[Path | None, typer.Option(help=suite.WHERE)] = None,
) -> None:
    """Open connections, send one request on each, then nothing, while a fleet sends. Exit 0: every limit was kept."""
    scenario = replace(IDLE, connections=connections, duration_s=seconds, until_closed=wait)
    if scenario != IDLE:
        scenario = replace(scenario, title=f"{connections:,} idle connections beside 500 devices for {seconds:g} s")
    files = raise_open_files()
    if connections + 4 * scenario.devices + OWN_FILES > files:
        raise typer.BadParameter(f"{files:,} open files are allowed; ulimit -n", param_hint="--connections")
    suite.one(scenario.name, scenario.title, partial(run, scenario), suite.where(out, usual=scenario == IDLE))


class Line(asyncio.Protocol):
    """A connection that asks once. Times are the loop's clock, NaN until it happens."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[bytes] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.answered_s = self.closed_s = math.nan

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not self.answer.done():
            self.answer.set_result(data.partition(b"\r\n")[0])
        self.answered_s = asyncio.get_running_loop().time()

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        self.closed_s = asyncio.get_running_loop().time()
        self.closed.set_result(None)
        if not self.answer.done():
            self.answer.set_exception(exc or ConnectionError("closed before the answer"))

    @property
    def lived_s(self) -> float:
        """From the last byte of its answer until the daemon closed it; NaN while it is open."""
        return self.closed_s - self.answered_s


def run(scenario: IdleScenario) -> Finding:
    """Open, send beside, wait for the end, compare every row."""
    with stack.running(make_fleet(scenario.devices, _SEED)) as own:
        return uvloop.run(_run(scenario, own))


async def _run(scenario: IdleScenario, own: stack.Stack) -> Finding:
    fleet = make_fleet(scenario.devices, _SEED)
    to = target(own.url)
    before_mb = own.memory().rss_mb
    lines = await opened(to, requests(to, fleet, scenario.connections))
    await asyncio.sleep(_SETTLE_S)
    open_mb = own.memory().rss_mb
    trial = await _trial(scenario, own, fleet)
    cut_early = sum(each.lived_s < KEEPALIVE_S - 1 for each in lines)  # NaN is open
    kb_each = round((open_mb - before_mb) * 1e3 / len(lines), 1)
    verdicts = [*trial.result.verdicts, hold(scenario.cut, cut_early), hold(scenario.memory, kb_each)]
    figures = {
        "connections": f"{len(lines):,} idle, every second one with a valid key; {cut_early} closed before their time",
        "memory": f"{before_mb:g} MB before, {open_mb:g} MB with them: {kb_each:g} kB each",
    }
    if scenario.until_closed:
        least_s, most_s = await _lives(lines)
        figures["kept"] = f"{least_s:.1f} to {most_s:.1f} s, of {KEEPALIVE_S:g}"
        verdicts += [hold(limit, value) for limit, value in zip(KEPT_FOR, (least_s, most_s), strict=True)]
    for each in lines:
        each.transport.close()
    finding = of_trial(scenario.name, scenario.title, trial)
    return replace(finding, verdicts=tuple(verdicts), figures={**finding.figures, **figures})


async def _trial(scenario: IdleScenario, own: stack.Stack, fleet: Sequence[Device]) -> Trial:
    plan = schedule(scenario.devices, scenario.interval_s, 0, scenario.duration_s, _SEED)
    with progress.line(len(plan), "heartbeats acknowledged") as show:
        sent = await open_loop(target(own.url), fleet, plan, pid=own.pid, seed=_SEED, progress=show)
    return await examine(own, fleet, sent, scenario.limits)


def requests(to: Target, fleet: Sequence[Device], connections: int) -> list[bytes]:
    """One for each connection. Every second one carries a device's key and a body that is no heartbeat: a proof, and
    no row."""
    proofs = [to.head(device) + b"2\r\n\r\n{}" for device in fleet]
    return [proofs[number % len(proofs)] if number % 2 else to.greeting() for number in range(connections)]


async def opened(to: Target, asked: Sequence[bytes]) -> list[Line]:
    """A connection for each request, which is answered."""
    loop = asyncio.get_running_loop()
    lines: list[Line] = []
    for start in range(0, len(asked), _AT_ONCE):
        some = asked[start : start + _AT_ONCE]
        making = (loop.create_connection(partial(Line, request), to.host, to.port) for request in some)
        made = [line for _, line in await asyncio.gather(*making)]
        async with asyncio.timeout(_ANSWER_S):
            answers = await asyncio.gather(*(line.answer for line in made))
        if strange := {answer for answer in answers if not answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 422"))}:
            raise stack.StackError(f"an idle connection was answered {strange}")
        lines += made
    return lines


async def _lives(lines: Sequence[Line]) -> tuple[float, float]:
    """The shortest and the longest life; of what is open too long, how long it was open so far."""
    loop = asyncio.get_running_loop()
    end = max(line.answered_s for line in lines) + KEEPALIVE_S + _MARGIN_S
    await asyncio.wait([line.closed for line in lines], timeout=end - loop.time())
    now = loop.time()
    lived = [now - line.answered_s if math.isnan(line.closed_s) else line.lived_s for line in lines]
    return round(min(lived), 1), round(max(lived), 1)
