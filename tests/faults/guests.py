"""Devices whose tokens operators change while everything breaks: each sends all the while, with the token that it has
and with those that it had, and knows which answers may come."""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

import asyncpg

from bench.fleet import Device
from nexhb import devices as store
from nexhb.errors import NexhbError
from tests.faults.asking import Heard, Line
from tests.faults.beats import beat_at, body_of
from tests.faults.record import Record, What

GUESTS = 8
KNOWN = 4  # of them, from the start
BOUND_S = 5.0  # from a change's commit until every answer follows it, where daemon and database hear each other
MACHINE_S = 1.0  # and what a busy machine may take
EVERY_S = 0.25
OLD_ONES = 0.3  # of what is sent: with a token that it had once, if there is one
_NOBODY = frozenset({-1})
_AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)
_STATES = "SELECT token_sha256, revoked_at IS NOT NULL AS revoked FROM device_tokens WHERE token_sha256 = ANY($1)"
_ADMIT = """
WITH made AS (INSERT INTO devices (device_id) VALUES ($1) RETURNING device_no)
INSERT INTO device_tokens (token_sha256, device_no) SELECT $2, device_no FROM made
"""


class Surroundings(Protocol):
    """What they need of the world."""

    @property
    def together_s(self) -> float:
        """Since when daemon and database hear each other; infinity while they may not."""

    @property
    def port(self) -> int:
        """Where devices send."""

    @property
    def processes(self) -> frozenset[int]:
        """The daemons that run."""

    def connection(self) -> AbstractAsyncContextManager[asyncpg.Connection]:
        """One to the database, past the proxies."""


class State(enum.StrEnum):
    """What the database says of a token."""

    GOOD = "good"
    REVOKED = "revoked"
    UNKNOWN = "unknown"  # not added yet, or rotated away
    FORGOTTEN = "forgotten"  # an older copy of the database does not know it, and no operator has said that it is right
    CHANGING = "changing"  # just now, and any answer is right


class Since(NamedTuple):
    """A state, and when it was found committed (the machine's monotonic clock)."""

    state: State
    at_s: float


def wrong(stands: Since, asked_s: float, together_s: float, heard: Heard) -> str:
    """Why this answer is wrong for a token that stood so from `asked_s` until it was heard; empty where it may be.
    `together_s`: since when daemon and database hear each other (infinity: they do not)."""
    due = asked_s > max(stands.at_s, together_s) + BOUND_S + MACHINE_S
    age = f"{asked_s - stands.at_s:.1f} s after that was committed"
    status = heard.said[:3]
    if status == "401" and stands.state in (State.GOOD, State.REVOKED, State.FORGOTTEN):
        return f"a {stands.state} token heard 401, {age}"
    if status == "410" and stands.state is State.GOOD and due:
        return f"a good token heard 410, {age}"
    if heard.what is What.ACKNOWLEDGED and stands.state not in (State.GOOD, State.CHANGING) and due:
        return f"a token that is {stands.state} heard {status}, {age}"
    return ""


@dataclass
class Guest:
    """One such device."""

    number: int
    device: Device
    clock: datetime
    tokens: dict[str, Since] = field(default_factory=dict)  # the newest last
    learned_by: dict[str, frozenset[int]] = field(default_factory=dict)  # token → daemons, one of which answered by it

    def change(self, state: State, tokens: Sequence[str] | None = None) -> None:
        """From now on these tokens, or all of them, stand so."""
        for token in tokens if tokens is not None else list(self.tokens):
            self.tokens[token] = Since(state, time.monotonic())

    def may_be(self, state: State) -> bool:
        """Whether its newest token stands so."""
        return bool(self.tokens) and list(self.tokens.values())[-1].state is state


class Guests:
    """All of them, and the operator."""

    def __init__(self, fleet: Sequence[Device], first: int, record: Record, seed: int) -> None:
        self._fleet, self._record = fleet, record
        self._rng = random.Random(f"nexhb guests:{seed}")  # noqa: S311 - a simulation
        began = datetime.now(UTC) - timedelta(hours=self._rng.uniform(20, 40))
        self.all = [Guest(number, fleet[number], began) for number in range(first, len(fleet))]
        self.wrong: list[tuple[int, str]] = []  # a device's number, and what was wrong
        for guest in self.all:  # the fleet's own token, which is not known yet to the database
            guest.tokens[guest.device.token] = Since(State.UNKNOWN, time.monotonic())

    @property
    def known(self) -> list[Device]:
        """Those that are known from the start."""
        return [guest.device for guest in self.all[:KNOWN]]

    @asynccontextmanager
    async def sending(self, world: Surroundings) -> AsyncIterator[None]:
        """They send for the block."""
        self._world = world
        for guest in self.all[:KNOWN]:
            guest.change(State.GOOD)
        tasks = [asyncio.create_task(self._send(guest)) for guest in self.all]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(error, Exception):
                    raise error

    async def _send(self, guest: Guest) -> None:
        while True:
            await asyncio.sleep(EVERY_S * (0.5 + self._rng.random()))
            tokens = list(guest.tokens)
            old = len(tokens) > 1 and self._rng.random() < OLD_ONES
            await self._ask(guest, self._rng.choice(tokens[:-1]) if old else tokens[-1])

    async def _ask(self, guest: Guest, token: str) -> None:
        """One heartbeat, and whether its answer was wrong."""
        stood, together_s, asked_s = guest.tokens[token], self._world.together_s, time.monotonic()
        processes = self._world.processes
        heard = await self._heartbeat(guest, token)
        if heard.said[:3] in ("200", "410") and guest.tokens[token] == stood:
            guest.learned_by[token] = processes | self._world.processes
        if guest.tokens[token] != stood or self._world.together_s != together_s:
            return
        if said := wrong(stood, asked_s, together_s, heard):
            self.wrong.append((guest.number, said))

    async def _heartbeat(self, guest: Guest, token: str) -> Heard:
        guest.clock += timedelta(seconds=self._rng.randint(11, 45))
        beat = beat_at(self._fleet, guest.number, guest.clock)
        line = Line(replace(guest.device, token=token), self._world.port)
        await self._record.add([beat], What.SENT)
        try:
            heard = await line.ask([body_of(self._fleet, beat)])
        finally:
            line.close()
        turned_away = heard.what is What.TURNED_AWAY and heard.said[:3] in ("401", "410")
        await self._record.add([beat], What.REFUSED if turned_away else heard.what, heard.said)
        return heard

    # ---- the operator ---------------------------------------------------------------------------------------------

    def pick(self, state: State, dice: float) -> Guest | None:
        """One whose newest token stands so."""
        those = [guest for guest in self.all if guest.may_be(state)]
        return those[int(dice * len(those))] if those else None

    async def rotate(self, guest: Guest) -> None:
        """A new token; the old ones are nobody's then."""

        async def act(conn: asyncpg.Connection) -> str:
            return await store.rotate(conn, guest.device.device_id)

        await self._change(guest, act)

    async def revoke(self, guest: Guest) -> None:
        """Its tokens are to hear 410."""

        async def act(conn: asyncpg.Connection) -> None:
            await store.revoke(conn, guest.device.device_id, datetime.now(UTC))

        await self._change(guest, act)

    async def readmit(self, guest: Guest) -> None:
        """That taken back."""

        async def act(conn: asyncpg.Connection) -> None:
            await store.readmit(conn, guest.device.device_id)

        await self._change(guest, act)

    async def admit(self, guest: Guest) -> None:
        """Its token, with which it came before anybody knew it, is known now."""

        async def act(conn: asyncpg.Connection) -> None:
            digest = store.hash_token(guest.device.token)
            await conn.execute(_ADMIT, guest.device.device_id, digest)

        await self._change(guest, act)

    async def _change(self, guest: Guest, act: Callable[[asyncpg.Connection], Awaitable[str | None]]) -> None:
        """A change, whatever comes between; in the end the database says how the tokens stand."""
        guest.change(State.CHANGING)
        with suppress(*_AWAY, NexhbError):
            async with self._world.connection() as conn:
                if token := await act(conn):
                    guest.tokens[token] = Since(State.CHANGING, time.monotonic())
        while not await self._read(guest):
            await asyncio.sleep(0.1)

    async def found_anew(self) -> None:
        """Another database is there: how each token stands in it. What no daemon had learned of before its database
        was lost, or one that has ended since, may be known to nobody: 401 is not wrong then."""
        for guest in self.all:
            knew = [
                token
                for token, since in guest.tokens.items()
                if since.state is not State.UNKNOWN and guest.learned_by.get(token, _NOBODY) <= self._world.processes
            ]
            guest.change(State.CHANGING)
            while not await self._read(guest):
                await asyncio.sleep(0.1)
            guest.change(State.FORGOTTEN, [token for token in knew if guest.tokens[token].state is State.UNKNOWN])

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """For the block the operator says that what is forgotten is gone: until he has said it, any answer is right."""
        gone = [
            (guest, token)
            for guest in self.all
            for token, since in guest.tokens.items()
            if since.state is State.FORGOTTEN
        ]
        for guest, token in gone:
            guest.change(State.CHANGING, [token])
        yield
        for guest, token in gone:
            guest.change(State.UNKNOWN, [token])

    async def _read(self, guest: Guest) -> bool:
        with suppress(*_AWAY):
            async with self._world.connection() as conn:
                hashes = {store.hash_token(token): token for token in guest.tokens}
                found = {row["token_sha256"]: row["revoked"] for row in await conn.fetch(_STATES, list(hashes))}
            for digest, token in hashes.items():
                state = State.UNKNOWN if digest not in found else State.REVOKED if found[digest] else State.GOOD
                guest.change(state, [token])
            return True
        return False

    async def settle(self, bound_s: float = BOUND_S + MACHINE_S) -> None:
        """With nothing broken, one more is revoked, and each token hears what it must within the bound; `wrong` says
        which one does not."""
        for guest in self.all:
            if guest.may_be(State.CHANGING):
                await self._read(guest)
        if one := self.pick(State.GOOD, 0.0):
            await self.revoke(one)
        await asyncio.gather(*(self._settle(guest, token, bound_s) for guest in self.all for token in guest.tokens))

    async def _settle(self, guest: Guest, token: str, bound_s: float) -> None:
        state, heard = guest.tokens[token].state, ""
        right = {State.GOOD: "200", State.REVOKED: "410", State.UNKNOWN: "401", State.FORGOTTEN: "503"}[state]
        until = time.monotonic() + bound_s
        while heard != right and time.monotonic() < until:
            heard = (await self._heartbeat(guest, token)).said[:3]
            await asyncio.sleep(0.1)
        if heard != right:
            self.wrong.append((guest.number, f"in the end a token that is {state} hears {heard}"))
