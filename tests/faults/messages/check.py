"""Compare what arrived with what the script requires, and with the outbox."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.faults.messages.receiver import Arrival

OUTBOX = """
SELECT n.id, n.incident_id, n.route, n.kind, n.delivered_at IS NOT NULL AS is_delivered,
       n.given_up_at IS NOT NULL AS is_given_up
FROM notifications n ORDER BY n.notification_no
"""
HAS_PENDING = "SELECT EXISTS (SELECT FROM notifications WHERE delivered_at IS NULL AND given_up_at IS NULL)"
INCIDENTS = "SELECT incident_id, kind, scope FROM incidents ORDER BY incident_id"

Thread = tuple[int, str]  # incident and route


def violations(
    required: Mapping[int, Sequence[str]], routes: Sequence[str], outbox: Sequence[Any], incidents: Sequence[Any],
    arrivals: Sequence[Arrival],
) -> Iterator[str]:  # fmt: skip
    """Yield a sentence for each broken promise. `required`: for each incident the kinds of its messages, in order."""
    for row in incidents:
        if row["incident_id"] not in required:
            yield f"invented: incident {row['incident_id']} ({row['kind']}, {row['scope']}) is not in the script"
    rows: dict[Thread, list[Any]] = defaultdict(list)
    for row in outbox:
        rows[row["incident_id"], row["route"]].append(row)
        if not row["is_delivered"] or row["is_given_up"]:
            yield f"lost: {row['kind']} of incident {row['incident_id']} for {row['route']} was never delivered"
    arrived: dict[Thread, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        if "incident_id" in arrival.data:
            arrived[arrival.data["incident_id"], arrival.route].append(arrival)
    threads = {(number, route) for number in required for route in routes}
    for thread in sorted(threads | rows.keys() | arrived.keys()):
        number, route = thread
        expected = list(required.get(number, ()))
        written = [row["kind"] for row in rows[thread]]
        if number in required and written != expected:
            yield f"wrong: the outbox has {written} of incident {number} for {route}, not {expected}"
        yield from _of_thread(thread, rows[thread], arrived[thread])


def _of_thread(thread: Thread, rows: Sequence[Any], arrived: Sequence[Arrival]) -> Iterator[str]:
    """Compare one incident's messages on one route: each arrived, with the outbox's id, and in order."""
    number, route = thread
    place = {row["id"]: index for index, row in enumerate(rows)}
    for row in rows:
        if all(arrival.message_id != row["id"] for arrival in arrived):
            yield f"lost: {row['kind']} of incident {number} never arrived at {route}"
    last = 0
    for arrival in arrived:
        at = place.get(arrival.message_id)
        if at is None or arrival.type != f"incident.{rows[at]['kind']}":
            yield f"doubled: {arrival.type} of incident {number} arrived at {route} with another id"
        elif at < last:
            yield f"order: {arrival.type} of incident {number} arrived at {route} after a later message"
        else:
            last = at


def of_outage(arrivals: Sequence[Arrival]) -> Iterator[str]:
    """Check what a route received about an outage of nexhb itself: that it cannot accept heartbeats, then that it can
    again, each with one id."""
    types = list(dict.fromkeys(arrival.type for arrival in arrivals))
    if types != ["nexhb.not_ready", "nexhb.ready"]:
        yield f"lost: with the database gone, {types} arrived, not nexhb.not_ready and nexhb.ready"
    if len({(arrival.type, arrival.message_id) for arrival in arrivals}) > len(types):
        yield "doubled: a message about the outage of nexhb itself arrived with several ids"


def doubles(arrivals: Sequence[Arrival]) -> int:
    """Return how many messages arrived again."""
    return len(arrivals) - len({(arrival.route, arrival.message_id) for arrival in arrivals})
