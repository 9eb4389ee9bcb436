"""The kills of a run. The seed alone determines them and their pauses; each waits for a request in flight."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tests.faults.cluster import Cluster, until_up
from tests.faults.daemon import Daemon
from tests.faults.messages.receiver import DEAF, FAILS, HANGS, Receiver

SERVER, RECEIVER = LANES = ("server", "receiver")
PAUSE_S = (0.2, 1.2)
FOR_S = (0.3, 2.0)  # how long a receiver is gone, or misbehaves
READY_S = 20.0  # limit for a restart
IN_FLIGHT_S = 2.0  # how long a kill waits for a request in flight


@dataclass
class Killer:
    """What can be killed, and what was."""

    cluster: Cluster
    daemon: Daemon
    receiver: Receiver
    done: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)  # with a request in flight

    async def kill(self, seed: int, kills: int, lanes: Sequence[str]) -> None:
        """Kill this often: daemon and database one after the other, and the receiver, half as often, beside them."""
        of_receiver = kills if SERVER not in lanes else kills // 3 if RECEIVER in lanes else 0
        await asyncio.gather(self._lane(seed, SERVER, kills - of_receiver), self._lane(seed, RECEIVER, of_receiver))

    async def _lane(self, seed: int, lane: str, kills: int) -> None:
        rng = random.Random(f"nexhb kills:{seed}:{lane}")  # noqa: S311 - a simulation
        acts = self._server if lane == SERVER else self._of_receiver
        bag: list[str] = []
        for _ in range(kills):
            if not bag:  # each kind as often as the others
                bag = list(acts)
                rng.shuffle(bag)
            name = bag.pop()
            await asyncio.sleep(rng.uniform(*PAUSE_S))
            await self._in_flight()
            self.done[name] += 1
            self.hit[name] += self.receiver.in_flight > 0
            await acts[name](rng.uniform(*FOR_S))

    @property
    def _server(self) -> dict[str, Callable[[float], Awaitable[None]]]:
        return {"daemon": self._kill_daemon, "database": self._kill_database, "both": self._kill_both}

    @property
    def _of_receiver(self) -> dict[str, Callable[[float], Awaitable[None]]]:
        return {
            "receiver": self._kill_receiver,
            f"receiver {HANGS}": lambda seconds: self._misbehave(HANGS, seconds),
            f"receiver {FAILS}": lambda seconds: self._misbehave(FAILS, seconds),
            f"receiver {DEAF}": lambda seconds: self._misbehave(DEAF, seconds),
        }

    async def _in_flight(self) -> None:
        deadline = asyncio.get_running_loop().time() + IN_FLIGHT_S
        while not self.receiver.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)

    async def _kill_daemon(self, _: float) -> None:
        starts = self.daemon.starts
        self.daemon.send_signal(signal.SIGKILL)
        await self.daemon.wait_for_restart(starts, READY_S)

    async def _kill_database(self, _: float) -> None:
        starts = self.cluster.starts
        self.cluster.kill()
        await self.cluster.wait_for_restart(starts)
        await self.daemon.ready(READY_S)

    async def _kill_both(self, seconds: float) -> None:
        await asyncio.gather(self._kill_database(seconds), self._kill_daemon(seconds))

    async def _kill_receiver(self, seconds: float) -> None:
        await self.receiver.kill()
        await asyncio.sleep(seconds)
        await self.receiver.start()

    async def _misbehave(self, mode: str, seconds: float) -> None:
        self.receiver.misbehave(mode)
        await asyncio.sleep(seconds)
        self.receiver.recover()

    async def take_database_away(self, is_told: Callable[[], bool], timeout_s: float) -> bool:
        """Stop the database until routes were told of that (at most `timeout_s` seconds), kill the daemon at once, and
        start both again. Return whether routes were told in time."""
        self.cluster.stop()
        is_in_time = await wait_until(is_told, timeout_s)
        self.daemon.send_signal(signal.SIGKILL)
        self.cluster.may_start()
        await until_up(self.cluster, READY_S)
        await self.daemon.ready(READY_S)
        return is_in_time


async def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until the condition is true; return False if it is not after `timeout_s` seconds."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True
