"""Several daemons on one PostgreSQL, which share a port and receive heartbeats as fast as possible."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

import uvloop

from bench import stack
from bench.check import Check
from bench.finding import LOAD_HEAD, Finding, load_cells, markdown
from bench.fleet import make_fleet
from bench.load import RATE_BOUND, Keys, LoadRun, Spliced, stream, target
from bench.process import free_port
from bench.report import at_most
from bench.runs import Plan, Say
from bench.trial import SEED, UNLIMITED, combined, examine

_INTRO: Final = (
    "## Several daemons\n\n"
    "There is one PostgreSQL, and daemons that share a port (`server.reuse_port`), so that the kernel distributes the "
    "connections. The load is a closed loop, and every row is compared. Daemons, PostgreSQL and generator share this "
    "machine's cores: several daemons gain only what one daemon leaves of the cores."
)


@dataclass(frozen=True)
class Daemons(Plan):
    """Several daemons on one PostgreSQL."""

    QUICK: ClassVar = {"warm_s": 0.5, "round_s": 3.0}

    name: str = "daemons"
    title: str = "1, 2 and 3 daemons on one PostgreSQL"
    devices: int = 2_000
    numbers: tuple[int, ...] = (1, 2, 3)
    connections: int = 256
    warm_s: float = 1.5
    round_s: float = 8.0

    def run(self, say: Say) -> Finding:
        """Start one daemon after the other and measure each number of them; return the finding."""
        rounds, compared = self.measure(say)
        total, first = combined(list(rounds.values())).result, next(iter(rounds.values())).result
        verdicts = (
            at_most("requests not acknowledged", 0, total.sent - total.ok),
            at_most("heartbeats acknowledged, but not in the database", 0, compared.missing),
            at_most("heartbeats in the database twice, or never sent", 0, compared.unexpected),
        )
        results = {number: run.result for number, run in rounds.items()}
        rows = [
            (f"{number}", *load_cells(each), f"{each.rate_per_s / first.rate_per_s:.2f}")
            for number, each in results.items()
        ]
        page = (_INTRO, markdown(("daemons", *LOAD_HEAD, "÷ one daemon's"), rows))
        details = {f"{number} daemons": asdict(each) for number, each in results.items()}
        cores = tuple(each.others_cores or 0.0 for each in results.values())
        return Finding(self.name, self.title, verdicts, {}, details, cores, page)

    def measure(self, say: Say) -> tuple[dict[int, LoadRun], Check]:
        """Return the run for each number of daemons, and the comparison of every row."""
        fleet, requests = make_fleet(self.devices, SEED), round(RATE_BOUND * (self.warm_s + self.round_s))
        keys, port = Keys((requests + len(fleet)) * len(self.numbers), len(fleet)), free_port()
        to, daemons, rounds = target(f"http://127.0.0.1:{port}"), list[stack.Stack](), dict[int, LoadRun]()
        with stack.postgres() as (folder, postgres), contextlib.ExitStack() as ending:
            settings = {**UNLIMITED, stack.DATABASE_URL: postgres.dsn}
            for number in self.numbers:
                while len(daemons) < number:
                    own_folder = folder / f"daemon-{len(daemons) + 1}"
                    own_folder.mkdir()
                    daemons.append(stack.Stack(own_folder, settings, shared_port=port))
                    ending.callback(daemons[-1].stop)
                    daemons[-1].start()
                    if len(daemons) == 1:
                        daemons[0].import_fleet(fleet)
                say(f"{number} daemon{'s' if number > 1 else ''}")
                options: dict[str, Any] = {
                    "connections": self.connections,
                    "duration_s": self.warm_s + self.round_s,
                    "warm_s": self.warm_s,
                }
                options |= {"pids": [own.pid for own in daemons], "beside": postgres.pid}
                rounds[number] = uvloop.run(stream(to, Spliced(to, fleet, keys.holding(requests)), **options))
            trial = uvloop.run(examine(daemons[0], fleet, combined(list(rounds.values())), ()))
        return rounds, trial.check
