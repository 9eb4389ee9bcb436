"""The load: a fleet's heartbeats over raw HTTP/1.1, cheap enough to share two cores with the server.

Four ways to send, one connection class: `open_loop` (a schedule, at its times), `agents` (each heartbeat until it is
acknowledged), `closed_loop` (as fast as it goes), `flood` (at a rate, whatever the server can take).
"""

from bench.load.agents import Backoff, agents
from bench.load.alarm import Alarm
from bench.load.closed_loop import closed_loop
from bench.load.connection import parse_head
from bench.load.flood import Flooded, Record, Stage, flood
from bench.load.open_loop import open_loop
from bench.load.pool import RATE_BOUND, Keys, Span, recent_span
from bench.load.sender import LoadRun, Progress
from bench.load.target import NotLoopbackError, Target, target

__all__ = (
    "RATE_BOUND",
    "Alarm",
    "Backoff",
    "Flooded",
    "Keys",
    "LoadRun",
    "NotLoopbackError",
    "Progress",
    "Record",
    "Span",
    "Stage",
    "Target",
    "agents",
    "closed_loop",
    "flood",
    "open_loop",
    "parse_head",
    "recent_span",
    "target",
)
