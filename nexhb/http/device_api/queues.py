"""POST /v1/heartbeats: a device's queue, stored block by block while it arrives.

Each block is a ticket, and at most two are in progress: a request holds a few hundred kB, however long its body is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from aiohttp import web

from nexhb import log, metrics
from nexhb.devices.store import Device
from nexhb.errors import Overloaded
from nexhb.heartbeat import FieldError, Refused
from nexhb.http.device_api import admission
from nexhb.http.device_api.context import DEVICE_API, DeviceApi
from nexhb.http.transport import body
from nexhb.http.transport.problem import Problem, json_response
from nexhb.ingest import parser
from nexhb.ingest.block_splitter import BLOCK_BYTES, MAX_BLOCK_ITEMS, BlockSplitter
from nexhb.ingest.intake import DEDUPLICATED, WRITTEN, Outcome, Verdict

_log = log.get("queues")
_TYPES = ("application/json", "application/x-ndjson", "application/jsonl")
MAX_REFUSED_LISTED = 1_000  # twice the number of heartbeats that an agent queues
_MAX_SHOWN = 10  # number of items whose errors are listed if no item is a heartbeat
_EXPECTED = FieldError(
    "", "must be an array of heartbeats, or one heartbeat per line (NDJSON), each an object with timestamp_utc"
)
_MAX_IN_PROGRESS = 2  # blocks
_MIN_BLOCK_BYTES = 2**16


async def post_heartbeats(request: web.Request) -> web.Response:
    """Store the valid heartbeats of a queue, a JSON array or NDJSON. The response lists the others by index."""
    api = request.app[DEVICE_API]
    max_bytes = api.settings.server.batch_body_max_bytes
    device = await admission.authenticate_sender(request, api, max_bytes=max_bytes, types=_TYPES)
    queue = _Queue(api, device)
    api.queues.add(queue)
    try:
        await _read(queue, request, api)
        return await queue.response()
    except Problem as problem:
        problem.close = problem.close or not request.content.is_eof()
        raise
    except MemoryError as error:
        raise queue.incomplete(error) from error
    finally:
        api.queues.discard(queue)


async def _read(queue: _Queue, request: web.Request, api: DeviceApi) -> None:
    server = api.settings.server
    pieces = body.Pieces(request, timeout_s=server.body_timeout_seconds, each_bytes=BLOCK_BYTES)
    size = 0
    try:
        while piece := await pieces.next():
            size += len(piece)
            if size > server.batch_body_max_bytes:
                raise Problem(413, f"The body has more than {server.batch_body_max_bytes} bytes.", close=True)
            queue.splitter.feed(piece)
            await queue.admit_blocks()
        await queue.admit_blocks(last=True)
    except Refused as refused:
        raise await queue.not_a_list(refused) from None


class _Block(NamedTuple):
    """A block of the queue, parsed."""

    size: int
    parsed: parser.ParsedQueue
    first: int = 0  # index of the block's first item in the queue

    def __len__(self) -> int:
        return len(self.parsed)


def _parse(api: DeviceApi, device: Device, max_items: int, block: bytes, ndjson: bool) -> _Block:
    parsed = parser.parse_many(
        block,
        ndjson=ndjson,
        max_items=max_items,
        device_no=device.device_no,
        device_id=device.device_id,
        received_at=api.now(),
        rules=api.rules,
    )
    return _Block(len(block), parsed)


class _Queue:
    """The queue of one request in progress."""

    def __init__(self, api: DeviceApi, device: Device) -> None:
        self._api = api
        self._device = device
        max_items = max(min(MAX_BLOCK_ITEMS, api.intake.max_items // _MAX_IN_PROGRESS), 1)
        self.splitter = BlockSplitter(
            # Not a method: a reference cycle would keep the parsed body in memory until garbage is collected.
            partial(_parse, api, device, max_items),
            item_bytes=api.settings.server.body_max_bytes,
            # Concurrent requests share the capacity of the intake.
            block_bytes=max(min(BLOCK_BYTES, api.intake.max_bytes // (1 + len(api.queues))), _MIN_BLOCK_BYTES),
            max_items=max_items,
        )
        self._in_progress: deque[tuple[_Block, asyncio.Future[list[Verdict]]]] = deque()
        self._admitted = 0  # heartbeats counted towards the device's rate limit
        self._written = self._deduplicated = 0
        self._has_heartbeat = False  # at least one item has a timestamp
        self._refused: list[dict[str, Any]] = []
        self._not_listed = 0

    async def admit_blocks(self, *, last: bool = False) -> None:
        """Admit the blocks that have arrived. Raise Refused if the body is not a list, or Problem for any other
        error."""
        while (block := self.splitter.next_block(last=last)) is not None:
            await self._admit(_Block(block.size, block.parsed, self.splitter.items - len(block)))

    async def response(self) -> web.Response:
        """Return the response once everything is committed. Raise a Problem if a heartbeat cannot be committed,
        or if no item is a heartbeat, because a client deletes its queue after a 2xx."""
        await self._await_all()
        if self.splitter.items and not self._has_heartbeat:
            raise Problem(400, "Nothing in the body is a heartbeat.", errors=[_EXPECTED, *self._first_errors()])
        if self._refused:
            first = self._first_errors()[0]
            path = first.path.partition(".")[2]
            self._api.troubles.refused(self._device, 422, f"In a queue: {first.message}", path or None)
        value: dict[str, Any] = {
            "ok": True,
            "written": self._written,
            "deduplicated": self._deduplicated,
            "refused": sorted(self._refused, key=lambda refusal: int(refusal["index"])),
            "next_heartbeat_seconds": admission.next_heartbeat_s(self._api),
        }
        if self._not_listed:
            value["refused_not_listed"] = self._not_listed
        return json_response(value)

    async def not_a_list(self, refused: Refused) -> Problem:
        """Return the problem for a body that cannot be parsed to its end. Raise a Problem if the heartbeats before the
        error could not be committed."""
        await self._await_all()
        items = self.splitter.items
        before = f" The heartbeats before index {items} are stored." if items else ""
        return Problem(refused.status, f"The body is not a list of heartbeats.{before}", errors=refused.errors)

    async def _admit(self, block: _Block) -> None:
        heartbeats, refused = block.parsed.heartbeats, block.parsed.refused
        self._has_heartbeat = self._has_heartbeat or block.parsed.has_timestamp
        max_heartbeats = self._api.settings.ingest.device_burst
        if self._admitted + len(block) > max_heartbeats:  # not 429: the client would repeat the request forever
            detail = f"One request may have at most {max_heartbeats} heartbeats; send the rest in smaller requests."
            raise Problem(413, detail, close=True)
        # One heartbeat was counted when the sender was authenticated.
        admission.enforce_rate(
            self._api, self._device, len(block) if block.first else len(block) - 1, admitted=self._admitted
        )
        self._admitted += len(block)
        if refused:
            self._api.intake.received += len(refused)
            metrics.heartbeats_refused.labels(reason="invalid").inc(len(refused))
            for index, error in refused.items():
                self._refuse(block.first + index, error.errors)
        for heartbeat in heartbeats:
            admission.count_anomalies(self._api, self._device, heartbeat)
        if heartbeats:
            await self._submit(block)
        await asyncio.sleep(0)  # a block takes 1 to 3 ms; other requests are served between two blocks

    async def _submit(self, block: _Block) -> None:
        """Submit the block to the intake; if the intake is full, wait until blocks in progress are committed."""
        intake, heartbeats = self._api.intake, block.parsed.heartbeats
        while len(self._in_progress) >= _MAX_IN_PROGRESS:
            await self._await_oldest()
        while True:
            admission.check_current(self._api, self._device)
            try:
                verdicts = intake.submit(heartbeats, block.size)
            except Overloaded:
                if self._in_progress:
                    await self._await_oldest()
                    continue
                intake.received += len(heartbeats)
                metrics.heartbeats_failed.labels(reason="overloaded").inc(len(heartbeats))
                raise self.incomplete() from None
            intake.received += len(heartbeats)
            self._in_progress.append((block, verdicts))
            return

    async def _await_all(self) -> None:
        while self._in_progress:
            await self._await_oldest()

    async def _await_oldest(self) -> None:
        block, future = self._in_progress.popleft()
        verdicts = await future
        written, deduplicated = verdicts.count(WRITTEN), verdicts.count(DEDUPLICATED)
        self._written += written
        self._deduplicated += deduplicated
        if written + deduplicated == len(verdicts):
            return
        for index, verdict in zip(block.parsed.indices, verdicts, strict=True):
            if verdict.outcome is Outcome.FAILED:
                raise self.incomplete()
            if verdict.outcome is Outcome.REFUSED:
                self._refuse(block.first + index, verdict.errors)

    def incomplete(self, error: MemoryError | None = None) -> Problem:
        """Return the 503 if not all heartbeats could be stored. Admitted blocks are still committed. The client repeats
        the whole request. The key of each row makes the repetition harmless, and the repetition must not count towards
        the rate limit."""
        self._api.device_rate.give_back(self._device.device_no, self._admitted)
        if error is not None:
            _log.error("queue.no_memory", device_id=self._device.device_id)
            return self._api.unavailability.retry_later(
                "There is not enough memory for all heartbeats. Keep them and send them again.", close=True
            )
        return self._api.unavailability.retry_later(
            "Not all heartbeats could be committed. Keep them and send them again."
        )

    def _first_errors(self) -> list[FieldError]:
        """Return the errors of the first refused items; each path begins with the index of the item."""
        return [
            FieldError(f"{refusal['index']}.{error['path']}".rstrip("."), error["message"])
            for refusal in self._refused[:_MAX_SHOWN]
            for error in refusal["errors"]
        ]

    def _refuse(self, index: int, errors: Sequence[FieldError]) -> None:
        if len(self._refused) < MAX_REFUSED_LISTED:
            self._refused.append({"index": index, "errors": [{"path": e.path, "message": e.message} for e in errors]})
        else:
            self._not_listed += 1
