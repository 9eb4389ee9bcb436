"""Devices whose tokens operators change while faults occur. Each device sends all the time, with its current token and
with former ones, and checks each response against those that are allowed for the state of the token."""

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
from nexhb.devices import registry
from nexhb.devices import tokens as device_tokens
from nexhb.errors import NexhbError
from tests.faults import background
from tests.faults.device_client import DeviceConnection, RequestOutcome
from tests.faults.heartbeats import body_of, heartbeat_at
from tests.faults.journal import Event, Journal

MANAGED_DEVICES = 8
KNOWN = 4  # the number of managed devices that the database has from the start
LIMIT_S = 5.0  # from the commit of a change until every response reflects it, while daemon and database are connected
MARGIN_S = 1.0  # added to LIMIT_S for a busy machine
EVERY_S = 0.25  # time between two heartbeats of a device
OLD_TOKENS = 0.3  # share of the requests that use a former token, if there is one
_NO_DAEMON = frozenset({-1})  # no running process has this ID
_ERRORS = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)
_STATES = "SELECT token_sha256, revoked_at IS NOT NULL AS revoked FROM device_tokens WHERE token_sha256 = ANY($1)"
_ADMIT = """
WITH made AS (INSERT INTO devices (device_id) VALUES ($1) RETURNING device_no)
INSERT INTO device_tokens (token_sha256, device_no) SELECT $2, device_no FROM made
"""


class Surroundings(Protocol):
    """The parts of the world that managed devices use."""

    @property
    def connected_since_s(self) -> float:
        """Since when daemon and database have been connected; infinity while a fault may disconnect them."""

    @property
    def port(self) -> int:
        """The port to which devices send."""

    @property
    def processes(self) -> frozenset[int]:
        """The process IDs of the daemons that are running."""

    def connection(self) -> AbstractAsyncContextManager[asyncpg.Connection]:
        """Return a connection to the database that does not pass through the proxies."""


class State(enum.StrEnum):
    """The state of a token in the database."""

    GOOD = "good"
    REVOKED = "revoked"
    UNKNOWN = "unknown"  # not added yet, or replaced by a rotation
    FORGOTTEN = "forgotten"  # an older copy of the database lacks it, and no operator has accepted that copy yet
    CHANGING = "changing"  # a change is under way, and any response is allowed


class TokenState(NamedTuple):
    """The state of a token, and a time at which that state was committed already (on the machine's monotonic clock)."""

    state: State
    at_s: float


def why_wrong(token_state: TokenState, sent_s: float, connected_since_s: float, outcome: RequestOutcome) -> str:
    """Return why the outcome is wrong for a token that was in the state `token_state` from `sent_s` until the response
    was received; empty if the outcome is allowed. `connected_since_s`: since when daemon and database have been
    connected (infinity: they are not)."""
    is_due = sent_s > max(token_state.at_s, connected_since_s) + LIMIT_S + MARGIN_S
    age = f"{sent_s - token_state.at_s:.1f} s after that state was committed"
    status = outcome.detail[:3]
    if status == "401" and token_state.state in (State.GOOD, State.REVOKED, State.FORGOTTEN):
        return f"a {token_state.state} token received 401, {age}"
    if status == "410" and token_state.state is State.GOOD and is_due:
        return f"a good token received 410, {age}"
    if outcome.event is Event.ACKNOWLEDGED and token_state.state not in (State.GOOD, State.CHANGING) and is_due:
        return f"a {token_state.state} token received {status}, {age}"
    return ""


@dataclass
class ManagedDevice:
    """A device whose tokens an operator changes."""

    number: int
    device: Device
    clock: datetime
    tokens: dict[str, TokenState] = field(default_factory=dict)  # in the order in which they were issued
    cached_by: dict[str, frozenset[int]] = field(
        default_factory=dict
    )  # token → PIDs of daemons, one of which has accepted the token

    def change(self, state: State, tokens: Sequence[str] | None = None) -> None:
        """Note that these tokens, or all tokens of the device if none are given, are in this state from now on."""
        for token in tokens if tokens is not None else list(self.tokens):
            self.tokens[token] = TokenState(state, time.monotonic())

    def is_in(self, state: State) -> bool:
        """Return whether the device's newest token is in this state."""
        return bool(self.tokens) and list(self.tokens.values())[-1].state is state


class ManagedDevices:
    """All managed devices, and the operator who changes their tokens."""

    def __init__(self, fleet: Sequence[Device], first: int, journal: Journal, seed: int) -> None:
        self._fleet, self._journal = fleet, journal
        self._rng = random.Random(f"nexhb guests:{seed}")  # noqa: S311 - a simulation
        began = datetime.now(UTC) - timedelta(hours=self._rng.uniform(20, 40))
        self.all = [ManagedDevice(number, fleet[number], began) for number in range(first, len(fleet))]
        self.violations: list[tuple[int, str]] = []  # the device's number, and why a response is wrong
        for managed in self.all:  # the device's token in the fleet, which the database does not know yet
            managed.tokens[managed.device.token] = TokenState(State.UNKNOWN, time.monotonic())

    @property
    def known(self) -> list[Device]:
        """The devices that the database knows from the start."""
        return [managed.device for managed in self.all[:KNOWN]]

    @asynccontextmanager
    async def sending(self, world: Surroundings) -> AsyncIterator[None]:
        """Let the managed devices send for the block."""
        self._world = world
        for managed in self.all[:KNOWN]:
            managed.change(State.GOOD)
        async with background.running(*(self._send(managed) for managed in self.all)):
            yield

    async def _send(self, managed: ManagedDevice) -> None:
        while True:
            await asyncio.sleep(EVERY_S * (0.5 + self._rng.random()))
            tokens = list(managed.tokens)
            old = len(tokens) > 1 and self._rng.random() < OLD_TOKENS
            await self._request(managed, self._rng.choice(tokens[:-1]) if old else tokens[-1])

    async def _request(self, managed: ManagedDevice, token: str) -> None:
        """Send one heartbeat, and add a violation if the response is wrong."""
        before, connected_since_s, sent_s = managed.tokens[token], self._world.connected_since_s, time.monotonic()
        processes = self._world.processes
        outcome = await self._heartbeat(managed, token)
        if outcome.detail[:3] in ("200", "410") and managed.tokens[token] == before:
            managed.cached_by[token] = processes | self._world.processes
        if managed.tokens[token] != before or self._world.connected_since_s != connected_since_s:
            return
        if reason := why_wrong(before, sent_s, connected_since_s, outcome):
            self.violations.append((managed.number, reason))

    async def _heartbeat(self, managed: ManagedDevice, token: str) -> RequestOutcome:
        managed.clock += timedelta(seconds=self._rng.randint(11, 45))
        heartbeat = heartbeat_at(self._fleet, managed.number, managed.clock)
        connection = DeviceConnection(replace(managed.device, token=token), self._world.port)
        await self._journal.add([heartbeat], Event.SENT)
        try:
            outcome = await connection.send([body_of(self._fleet, heartbeat)])
        finally:
            connection.close()
        is_token_rejected = outcome.event is Event.REJECTED and outcome.detail[:3] in ("401", "410")
        await self._journal.add([heartbeat], Event.REFUSED if is_token_rejected else outcome.event, outcome.detail)
        return outcome

    # ---- the operator ---------------------------------------------------------------------------------------------

    def pick(self, state: State, dice: float) -> ManagedDevice | None:
        """Return the device that `dice` (0 to 1) selects among those whose newest token is in this state, or None."""
        candidates = [managed for managed in self.all if managed.is_in(state)]
        return candidates[int(dice * len(candidates))] if candidates else None

    async def rotate(self, managed: ManagedDevice) -> None:
        """Issue a new token for the device; its old tokens then belong to no device."""

        async def act(conn: asyncpg.Connection) -> str:
            return await registry.rotate(conn, managed.device.device_id)

        await self._change(managed, act)

    async def revoke(self, managed: ManagedDevice) -> None:
        """Revoke the device's tokens; requests with them are to receive 410."""

        async def act(conn: asyncpg.Connection) -> None:
            await registry.revoke(conn, managed.device.device_id, datetime.now(UTC))

        await self._change(managed, act)

    async def readmit(self, managed: ManagedDevice) -> None:
        """Undo the revocation of the device's tokens."""

        async def act(conn: asyncpg.Connection) -> None:
            await registry.readmit(conn, managed.device.device_id)

        await self._change(managed, act)

    async def admit(self, managed: ManagedDevice) -> None:
        """Add the device to the database, with the token with which it has been sending while it was unknown."""

        async def act(conn: asyncpg.Connection) -> None:
            digest = device_tokens.hash_token(managed.device.token)
            await conn.execute(_ADMIT, managed.device.device_id, digest)

        await self._change(managed, act)

    async def _change(self, managed: ManagedDevice, act: Callable[[asyncpg.Connection], Awaitable[str | None]]) -> None:
        """Make a change, even if an error interrupts it; afterwards read the state of each token from the database."""
        managed.change(State.CHANGING)
        with suppress(*_ERRORS, NexhbError):
            async with self._world.connection() as conn:
                if token := await act(conn):
                    managed.tokens[token] = TokenState(State.CHANGING, time.monotonic())
        while not await self._read(managed):
            await asyncio.sleep(0.1)

    async def read_states_again(self) -> None:
        """Read the state of each token after another database has replaced the former one. A token that the new
        database lacks is FORGOTTEN, and must not receive 401, if every daemon that may have cached it is still running.
        If one of these daemons has ended, perhaps no daemon has the token in its cache; then 401 is right, too."""
        for managed in self.all:
            cached = [
                token
                for token, token_state in managed.tokens.items()
                if token_state.state is not State.UNKNOWN
                and managed.cached_by.get(token, _NO_DAEMON) <= self._world.processes
            ]
            managed.change(State.CHANGING)
            while not await self._read(managed):
                await asyncio.sleep(0.1)
            managed.change(State.FORGOTTEN, [token for token in cached if managed.tokens[token].state is State.UNKNOWN])

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """In the block the operator accepts that the new database lacks the FORGOTTEN tokens. Meanwhile any response to
        them is allowed; after the block they are UNKNOWN."""
        forgotten = [
            (managed, token)
            for managed in self.all
            for token, token_state in managed.tokens.items()
            if token_state.state is State.FORGOTTEN
        ]
        for managed, token in forgotten:
            managed.change(State.CHANGING, [token])
        yield
        for managed, token in forgotten:
            managed.change(State.UNKNOWN, [token])

    async def _read(self, managed: ManagedDevice) -> bool:
        with suppress(*_ERRORS):
            async with self._world.connection() as conn:
                hashes = {device_tokens.hash_token(token): token for token in managed.tokens}
                revoked = {row["token_sha256"]: row["revoked"] for row in await conn.fetch(_STATES, list(hashes))}
            for digest, token in hashes.items():
                state = State.UNKNOWN if digest not in revoked else State.REVOKED if revoked[digest] else State.GOOD
                managed.change(state, [token])
            return True
        return False

    async def settle(self, limit_s: float = LIMIT_S + MARGIN_S) -> None:
        """While no fault lasts, revoke one more device, and add a violation for each token that does not receive the
        right response within `limit_s` seconds."""
        for managed in self.all:
            if managed.is_in(State.CHANGING):
                await self._read(managed)
        if device := self.pick(State.GOOD, 0.0):
            await self.revoke(device)
        await asyncio.gather(
            *(self._settle(managed, token, limit_s) for managed in self.all for token in managed.tokens)
        )

    async def _settle(self, managed: ManagedDevice, token: str, limit_s: float) -> None:
        state, status = managed.tokens[token].state, ""
        expected = {State.GOOD: "200", State.REVOKED: "410", State.UNKNOWN: "401", State.FORGOTTEN: "503"}[state]
        until = time.monotonic() + limit_s
        while status != expected and time.monotonic() < until:
            status = (await self._heartbeat(managed, token)).detail[:3]
            await asyncio.sleep(0.1)
        if status != expected:
            self.violations.append((managed.number, f"in the end a {state} token received {status}"))
