"""How many daemons a load wants: the formula of packaging/prometheus (`nexhb:daemons_wanted`), here for measured
figures. tests/promises/test_daemons_wanted.py holds the two together. Pure."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

# of a core for each daemon: what is left is for bursts, and for the time until another one runs
CORE_SHARE: Final = 0.6
# One that is slow with less CPU than this waits for PostgreSQL, and a second one would wait beside it.
BUSY_SHARE: Final = 0.3
QUEUE_WAIT_S: Final = 0.2
LOOP_LAG_S: Final = 0.1
BATCH_FILLED: Final = 0.9


class Signals(NamedTuple):
    """What daemons say of the last minutes. Waits are 99th percentiles of the slowest one; None: nothing was seen."""

    daemons: int
    # of all of them, in cores
    cpu_cores: float
    queue_wait_s: float | None = None
    loop_lag_s: float | None = None
    # mean heartbeats of a transaction, of ingest.batch_max
    batch_filled: float | None = None


def daemons_wanted(of: Signals) -> int:
    """By CPU; one more than there are where that is enough and heartbeats wait all the same."""
    by_cpu = max(1, math.ceil(of.cpu_cores / CORE_SHARE))
    slow = (
        (of.queue_wait_s or 0) > QUEUE_WAIT_S
        or (of.loop_lag_s or 0) > LOOP_LAG_S
        or (of.batch_filled or 0) > BATCH_FILLED
    )
    if slow and of.cpu_cores / of.daemons > BUSY_SHARE:
        return max(by_cpu, of.daemons + 1)
    return by_cpu
