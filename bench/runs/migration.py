"""Import a NexMDM history while the fleet of scenario 1 sends: measure the rate, and the latency of the heartbeats."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final

import uvloop

from bench import nexmdm, stack
from bench.finding import Finding, spread
from bench.fleet import make_fleet, schedule
from bench.load import LoadRun
from bench.report import ALL_ACKNOWLEDGED, FLOORS, at_least, judge
from bench.runs import Plan, Say
from bench.trial import SEED, send
from nexhb.partitions import midnight

_OLD_SEED: Final = 2  # seed of the old system's fleet, which has none of the devices that send
_DATABASE: Final = "nexmdm"
_MAX_S: Final = 7200.0


@dataclass(frozen=True)
class Import(Plan):
    """A NexMDM history imported under load."""

    QUICK: ClassVar = {"days": 1}

    name: str = "import"
    title: str = "a NexMDM history imported while 500 devices send"
    # devices of the old system, and as many other devices that send
    devices: int = 500
    days: int = 7
    # the import's --rate
    rate: int = 10_000

    def run(self, say: Say) -> Finding:
        """Fill the old system's database, import it under load, compare both databases; return the finding."""
        with stack.running(make_fleet(self.devices, SEED)) as own:
            run, imported = uvloop.run(self._run(own))
        result, beats = judge(run.result, (*ALL_ACKNOWLEDGED, *FLOORS)), imported["heartbeats"]
        rate = beats["written"] / max(imported["seconds"], 0.1)
        figures = {
            "import": f"{beats['written']:,} of {beats['source']:,} rows written in {imported['seconds']:,.0f} s, "
            f"{rate:,.0f}/s of {self.rate:,}/s at most; both sides agree: {imported['agrees']}",
            "load": f"{result.ok:,} of {result.sent:,} acknowledged, {spread(result.latency)}",
        }
        details = {"import": imported, "load": asdict(run.result)}
        verdicts = (*result.verdicts, at_least("both sides agree", 1, int(imported["agrees"])))
        return Finding(self.name, self.title, verdicts, figures, details, (result.others_cores or 0.0,))

    async def _run(self, own: stack.Stack) -> tuple[LoadRun, dict[str, Any]]:
        await self._fill(own)
        fleet, over = make_fleet(self.devices, SEED), asyncio.Event()
        load = asyncio.create_task(send(own, fleet, schedule(self.devices, 60, 0, _MAX_S, SEED), until=over))
        options = ("--source", own.dsn_of(_DATABASE), "--days", f"{self.days}", "--rate", f"{self.rate}", "--json")
        try:
            await asyncio.sleep(5)
            imported = await asyncio.to_thread(lambda: own.command("import-legacy", *options, timeout_s=_MAX_S))
        finally:
            over.set()
            run = await load
        return run, imported

    async def _fill(self, own: stack.Stack) -> None:
        """Create and fill the old system's database, on the same server."""
        async with own.connected() as conn:
            await conn.execute(f"CREATE DATABASE {_DATABASE}")
        async with own.connected(_DATABASE) as conn:
            now = datetime.now(UTC)
            first, every = midnight(now.date() - timedelta(days=self.days)), timedelta(minutes=1)
            await nexmdm.MONOLITHIC.create(conn, first, now)
            await nexmdm.add_devices(conn, [(d.device_id, d.token) for d in make_fleet(self.devices, _OLD_SEED)])
            await nexmdm.add_history(conn, first, now - timedelta(minutes=20), every)
            await conn.execute("VACUUM ANALYZE")
