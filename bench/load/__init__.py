"""The load: a fleet's heartbeats over raw HTTP/1.1, cheap enough to share two cores with the server.

Two senders share one connection class: `stream` sends each request when it is due, or as fast as possible, and `agents`
repeat each heartbeat until it is acknowledged. `requests` makes what `stream` sends.
"""

from bench.load.agents import Backoff, agents
from bench.load.requests import Keys, Scheduled, Spliced
from bench.load.sender import LoadRun, Target, target
from bench.load.stream import RATE_BOUND, due_times, stream

__all__ = (
    "RATE_BOUND", "Backoff", "Keys", "LoadRun", "Scheduled", "Spliced", "Target", "agents",
    "due_times", "stream", "target",
)  # fmt: skip
