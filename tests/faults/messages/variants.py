"""The daemon of a run, with its times scaled down; and daemons that break a promise about messages, which the run must
catch.

`python -m tests.faults.messages.variants NAME SCALE TOLD_AFTER_S serve` runs `nexhb serve` with a variant in place of
the real code.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from nexhb import cli
from nexhb.messages import channels, delivery, own_outage, webhooks
from nexhb.messages.delivery import Delivery
from nexhb.messages.message import Message
from nexhb.messages.routes import Route

REAL = "real"


def _change(statement: str, old: str, new: str) -> None:
    text = delivery._Q[statement]
    assert old in text
    delivery._Q = {**delivery._Q, statement: text.replace(old, new)}


def _records_before_it_sends() -> None:
    """Record a message as delivered when it is claimed."""
    _change("claim", "SET lease_until = $3", "SET delivered_at = $2, lease_until = $3")


def _gives_a_retry_a_new_id() -> None:
    """Give a message another id each time that it is sent again."""
    start, send, attempts = Delivery._start, webhooks.Webhooks.send, dict[str, int]()

    def noting(self: Delivery, route: Route, row: Any, lease_until: datetime) -> None:
        attempts[row["id"]] = row["attempts"]
        start(self, route, row, lease_until)

    async def renaming(self: webhooks.Webhooks, url: str, secret: str, message: Message, **options: Any) -> None:
        is_retry = attempts.get(message.message_id, 1) > 1
        renamed = replace(message, message_id=f"msg_{uuid.uuid4().hex}") if is_retry else message
        await send(self, url, secret, renamed, **options)

    Delivery._start = noting  # type: ignore[method-assign]
    webhooks.Webhooks.send = renaming  # type: ignore[method-assign]


def _claims_without_order() -> None:
    """Claim any message, although an older one about the same incident was not delivered yet."""
    _change("claim", "AND e.delivered_at IS NULL", "AND false")


def _forgets_what_failed() -> None:
    """Give a message up after its first failure."""
    _change("failed", "SET lease_until = NULL", "SET given_up_at = due_at, lease_until = NULL")


def _says_nothing_about_itself() -> None:
    """Tell no route that nexhb itself cannot accept heartbeats."""

    async def silent(self: own_outage.OwnOutage) -> None:
        await asyncio.Event().wait()

    own_outage.OwnOutage.run = silent  # type: ignore[method-assign]


VARIANTS: dict[str, Callable[[], None]] = {
    "records-before-it-sends": _records_before_it_sends,
    "gives-a-retry-a-new-id": _gives_a_retry_a_new_id,
    "claims-without-order": _claims_without_order,
    "forgets-what-failed": _forgets_what_failed,
    "says-nothing-about-itself": _says_nothing_about_itself,
}


def scale_times(scale: float, told_after_s: float) -> None:
    """Multiply every time of the delivery by `scale`, so that all keep their order: a lease is longer than the timeout
    of a delivery, which is longer than that of a request. Routes are told of an outage after `told_after_s`."""
    webhooks.TIMEOUT_S *= scale
    channels.TIMEOUT_S *= scale
    delivery.LEASE *= scale
    delivery.POLL_S *= scale
    delivery.FIRST_RETRY *= scale
    delivery.LONGEST_RETRY *= scale
    own_outage.LONGEST_RETRY_S *= scale
    own_outage.TOLD_AFTER = timedelta(seconds=told_after_s)


def main() -> None:
    """Run nexhb with the variant and the times that the first three arguments name."""
    name, scale, told_after_s = sys.argv.pop(1), float(sys.argv.pop(1)), float(sys.argv.pop(1))
    scale_times(scale, told_after_s)
    if name != REAL:
        VARIANTS[name]()
    cli.main()


if __name__ == "__main__":
    main()
