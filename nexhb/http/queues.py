"""POST /v1/heartbeats: a device's queue, taken block by block while it arrives.

Each block is a ticket, and at most two are under way: whatever a body's length, a request holds a few hundred kB.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from aiohttp import web

from nexhb import log, metrics, wire
from nexhb.blocks import BLOCK_BYTES, ITEMS_MOST, Blocks
from nexhb.devices import Device
from nexhb.errors import Overloaded
from nexhb.http import body
from nexhb.http.heartbeats import hold_to_rate, note, sender_of
from nexhb.http.parts import PARTS, Parts
from nexhb.http.problem import Problem, answer
from nexhb.intake import DEDUPLICATED, WRITTEN, Outcome, Verdict

_log = log.get("queues")
_TYPES = ("application/json", "application/x-ndjson", "application/jsonl")
REFUSED_LISTED = 1_000  # the agent's whole queue, twice
_SHOWN = 10  # items of a body in which nothing is a heartbeat
_EXPECTED = wire.FieldError(
    "", "takes an array of heartbeats, or one heartbeat a line (NDJSON); each is an object with timestamp_utc"
)
_UNDER_WAY = 2
_BLOCK_LEAST = 2**16


async def post_heartbeats(request: web.Request) -> web.Response:
    """A queue of one device: a JSON array or NDJSON. Good ones are kept, bad ones named by their place."""
    parts = request.app[PARTS]
    device = await sender_of(request, parts, most=parts.settings.server.batch_body_max_bytes, types=_TYPES)
    queue = _Queue(parts, device)
    parts.queues.add(queue)
    try:
        await _read(queue, request, parts)
        return await queue.answer()
    except Problem as problem:
        problem.close = problem.close or not request.content.is_eof()
        raise
    except MemoryError as error:
        raise queue.not_all(error) from error
    finally:
        parts.queues.discard(queue)


async def _read(queue: _Queue, request: web.Request, parts: Parts) -> None:
    server = parts.settings.server
    pieces = body.Pieces(request, timeout_s=server.body_timeout_seconds, each_bytes=BLOCK_BYTES)
    size = 0
    try:
        while piece := await pieces.next():
            size += len(piece)
            if size > server.batch_body_max_bytes:
                raise Problem(413, f"The body takes at most {server.batch_body_max_bytes} bytes.", close=True)
            queue.blocks.feed(piece)
            await queue.take()
        await queue.take(last=True)
    except wire.Refused as refused:
        raise await queue.no_list(refused) from None


class _Block(NamedTuple):
    """What was read at once."""

    size: int
    found: wire.Queue
    first: int = 0  # its place in the queue

    def __len__(self) -> int:
        return len(self.found)


def _parse(parts: Parts, device: Device, most: int, block: bytes, ndjson: bool) -> _Block:
    found = wire.parse_many(
        block,
        ndjson=ndjson,
        most=most,
        device_no=device.device_no,
        device_id=device.device_id,
        received_at=parts.now(),
        rules=parts.rules,
    )
    return _Block(len(block), found)


class _Queue:
    """One request under way."""

    def __init__(self, parts: Parts, device: Device) -> None:
        self._parts = parts
        self._device = device
        items_most = max(min(ITEMS_MOST, parts.intake.max_items // _UNDER_WAY), 1)
        self.blocks = Blocks(
            # No method: with a circle, what came of a body would stay until the collector comes.
            partial(_parse, parts, device, items_most),
            item_bytes=parts.settings.server.body_max_bytes,
            # Those that come at once share what the intake may hold.
            block_bytes=max(min(BLOCK_BYTES, parts.intake.max_bytes // (1 + len(parts.queues))), _BLOCK_LEAST),
            items_most=items_most,
        )
        self._under_way: deque[tuple[_Block, asyncio.Future[list[Verdict]]]] = deque()
        self._held = 0  # to the device's rate
        self._written = self._deduplicated = 0
        self._understood = False  # at least one of them
        self._refused: list[dict[str, Any]] = []
        self._not_listed = 0

    async def take(self, *, last: bool = False) -> None:
        """Admit what has come so far. Raises wire.Refused where it is no list, and a Problem."""
        while (block := self.blocks.take(last=last)) is not None:
            await self._admit(_Block(block.size, block.found, self.blocks.items - len(block)))

    async def answer(self) -> web.Response:
        """Once all of it is committed. Raises a Problem where it is not, and where nothing of it was a heartbeat: a
        client deletes at 2xx."""
        await self._await_all()
        if self.blocks.items and not self._understood:
            raise Problem(400, "Nothing in the body is a heartbeat.", errors=[_EXPECTED, *self._first_errors()])
        if self._refused:
            first = self._first_errors()[0]
            path = first.path.partition(".")[2]
            self._parts.troubles.refused(self._device, 422, f"In a queue: {first.message}", path or None)
        value: dict[str, Any] = {
            "ok": True,
            "written": self._written,
            "deduplicated": self._deduplicated,
            "refused": sorted(self._refused, key=lambda refusal: int(refusal["index"])),
            "next_heartbeat_seconds": self._parts.next_heartbeat_s(),
        }
        if self._not_listed:
            value["refused_not_listed"] = self._not_listed
        return answer(value)

    async def no_list(self, refused: wire.Refused) -> Problem:
        """What to answer where the body cannot be read, or no further. Raises a Problem where what came before is not
        committed either."""
        await self._await_all()
        before = f" What came before heartbeat {self.blocks.items} is kept." if self.blocks.items else ""
        return Problem(refused.status, f"The body is not a list of heartbeats.{before}", errors=refused.errors)

    async def _admit(self, block: _Block) -> None:
        heartbeats, refused = block.found.heartbeats, block.found.refused
        self._understood = self._understood or block.found.understood
        most = self._parts.settings.ingest.device_burst
        if self._held + len(block) > most:  # as a 429 it would come again for ever
            raise Problem(413, f"A request brings at most {most} heartbeats: send what is left in parts.", close=True)
        # One is taken for the request itself.
        hold_to_rate(self._parts, self._device, len(block) if block.first else len(block) - 1, taken=self._held)
        self._held += len(block)
        if refused:
            self._parts.intake.received += len(refused)
            metrics.heartbeats_refused.labels(reason="invalid").inc(len(refused))
            for place, why in refused.items():
                self._refuse(block.first + place, why.errors)
        for heartbeat in heartbeats:
            note(self._parts, self._device, heartbeat)
        if heartbeats:
            await self._ask(block)
        await asyncio.sleep(0)  # a block takes 1 to 3 ms: others are served between two

    async def _ask(self, block: _Block) -> None:
        """Into the intake; where that is full, once what is under way made room."""
        intake, heartbeats = self._parts.intake, block.found.heartbeats
        while len(self._under_way) >= _UNDER_WAY:
            await self._await_oldest()
        while True:
            self._parts.check_current(self._device)
            try:
                asked = intake.ask(heartbeats, block.size)
            except Overloaded:
                if self._under_way:
                    await self._await_oldest()
                    continue
                intake.received += len(heartbeats)
                metrics.heartbeats_failed.labels(reason="overloaded").inc(len(heartbeats))
                raise self.not_all() from None
            intake.received += len(heartbeats)
            self._under_way.append((block, asked))
            return

    async def _await_all(self) -> None:
        while self._under_way:
            await self._await_oldest()

    async def _await_oldest(self) -> None:
        block, asked = self._under_way.popleft()
        verdicts = await asked
        written, deduplicated = verdicts.count(WRITTEN), verdicts.count(DEDUPLICATED)
        self._written += written
        self._deduplicated += deduplicated
        if written + deduplicated == len(verdicts):
            return
        for place, verdict in zip(block.found.places, verdicts, strict=True):
            if verdict.outcome is Outcome.FAILED:
                raise self.not_all()
            if verdict.outcome is Outcome.REFUSED:
                self._refuse(block.first + place, verdict.errors)

    def not_all(self, error: MemoryError | None = None) -> Problem:
        """What is admitted is committed; the request as a whole is sent again, and the key of each row makes that
        harmless. Who sends again what we could not keep does not come too often."""
        self._parts.device_rate.give_back(self._device.device_no, self._held)
        if error is not None:
            _log.error("queue.no_memory", device_id=self._device.device_id)
            return self._parts.come_back(
                "Not enough memory for all heartbeats. Keep them and send them again.", close=True
            )
        return self._parts.come_back("Not all heartbeats could be committed. Keep them and send them again.")

    def _first_errors(self) -> list[wire.FieldError]:
        """What is wrong with the first of them; each path begins with its place."""
        return [
            wire.FieldError(f"{refusal['index']}.{error['path']}".rstrip("."), error["message"])
            for refusal in self._refused[:_SHOWN]
            for error in refusal["errors"]
        ]

    def _refuse(self, index: int, errors: Sequence[wire.FieldError]) -> None:
        if len(self._refused) < REFUSED_LISTED:
            self._refused.append({"index": index, "errors": [{"path": e.path, "message": e.message} for e in errors]})
        else:
            self._not_listed += 1
