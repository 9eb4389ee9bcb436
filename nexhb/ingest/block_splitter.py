"""Split a list of heartbeats into blocks while it arrives. Pure: the caller reads the body and feeds it.

The end of a block is guessed, and parsing the block, which is necessary anyway, proves the guess: JSON is read from
left to right, so `[` + the bytes so far + `]` is an array only if the cut lies between two items. The scan that finds
the exact end costs 10 µs per heartbeat, the guess next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sized
from typing import Generic, NamedTuple, TypeVar

from nexhb.heartbeat import FieldError, Refused

Parsed = TypeVar("Parsed", bound=Sized)

BLOCK_BYTES = 2**18  # about 260 of the agent's heartbeats
MAX_BLOCK_ITEMS = 500  # parsing this many takes 2 to 3 ms of the event loop's time

_BOM = b"\xef\xbb\xbf"
_GUESS_WITHIN = 2**14
_HEAD = re.compile(rb'\{\s*+"[^"\\]{1,100}"\s*+:')
# Matches up to the next bracket, brace or comma outside of a string; an unfinished string extends to the buffer's end.
_TO_MARK = rb'(?:[^"%b]++|"(?:[^"\\]++|\\.)*+(?:"|\\?\Z))*+[%b]'
_TO_BRACKET = re.compile(_TO_MARK.replace(b"%b", rb"\[\]{}"), re.DOTALL)
_TO_COMMA = re.compile(_TO_MARK.replace(b"%b", rb"\[\]{},"), re.DOTALL)
_END = ord("]")
_MAX_DEPTH = 1_000  # no JSON decoder of nexhb accepts deeper nesting
_DEPTH = dict(zip(b"[{]}", (1, 1, -1, -1), strict=True))


class _Cut(NamedTuple):
    """The block is buffer[:end], and the next block begins at `rest`. `last`: the array ends here."""

    end: int
    rest: int
    last: bool = False


class BlockSplitter(Generic[Parsed]):
    """Split a JSON array, or lines of one item each (NDJSON). The first character decides which it is: a client that
    sends a wrong Content-Type, or none, must not have its queue refused, because it would then delete the queue.

    `parse(block, ndjson)` parses one block, an array or lines, into an object whose length is its number of items. It
    raises Refused, without side effects, if the block is not JSON or has more than `max_items`. A block of lines may
    begin or end with blank lines. No block is larger than `block_bytes`, except for a single item of up to
    `item_bytes`; the buffer holds no more than that plus one fed chunk.
    """

    def __init__(
        self,
        parse: Callable[[bytes, bool], Parsed],
        *,
        item_bytes: int,
        block_bytes: int = BLOCK_BYTES,
        max_items: int = MAX_BLOCK_ITEMS,
    ) -> None:
        self.items = 0  # number of items in the blocks returned so far
        self._parse = parse
        self._item_bytes = max(item_bytes, block_bytes)
        self._block_bytes = block_bytes
        self._items_most = max_items
        self._max_size = block_bytes  # bytes of the next block: `max_items` items like those of the last block
        self._retry_at = block_bytes  # bytes in the buffer before another cut is tried
        self._buffer = bytearray()
        self._ndjson: bool | None = None
        self._is_empty = True  # only a BOM and blanks so far
        self._ended = False

    def feed(self, chunk: bytes) -> None:
        """Add bytes that arrived. Raise Refused if the array has ended already."""
        self._buffer += chunk
        if self._ended:
            self._check_end()

    def next_block(self, *, last: bool = False) -> Parsed | None:
        """Return the next block, or None if it is not complete yet or the list has ended. Call it until it returns
        None. `last`: no more bytes will be fed.

        Raise Refused: 400 if the body is not a list or is incomplete, 413 if an item is too large.
        """
        if self._ended or not self._detect_format(last):
            return None
        held = len(self._buffer)
        if last and self._ndjson and not self._buffer.strip():
            return None
        if last and held <= self._max_size:
            guess = self._cut_at_end()
        elif last or held >= self._retry_at:
            guess = self._guess_cut(last)
        else:
            return None
        # Not the exception itself: its traceback would keep this frame, and the block, until garbage is collected.
        errors, status = self._incomplete(), 400
        if guess:
            try:
                return self._cut(guess)
            except Refused as error:
                errors, status = error.errors, error.status
        if exact := self._cut_lines() if self._ndjson else self._exact_cut():
            return self._cut(exact)
        if last and held <= self._item_bytes:
            raise Refused(errors, status)
        if held > self._item_bytes:
            raise Refused([FieldError("", f"heartbeat {self.items} takes more than {self._item_bytes} bytes")], 413)
        self._retry_at = 2 * held  # do not scan a large item again with each chunk
        return None

    def _detect_format(self, last: bool) -> bool:
        """Detect whether the body is an array or lines; return False while only blanks have arrived."""
        if self._ndjson is not None:
            return True
        if self._is_empty and not last and len(self._buffer) < len(_BOM) and _BOM.startswith(bytes(self._buffer)):
            return False
        if self._is_empty and self._buffer.startswith(_BOM):
            del self._buffer[: len(_BOM)]
        self._is_empty = self._is_empty and not self._buffer
        del self._buffer[: len(self._buffer) - len(self._buffer.lstrip())]
        if not self._buffer:
            return False
        self._ndjson = not self._buffer.startswith(b"[")
        if not self._ndjson:
            del self._buffer[:1]
        return True

    # ---- where to cut -------------------------------------------------------------------------------------------

    def _cut_at_end(self) -> _Cut | None:
        if self._ndjson:
            return _Cut(len(self._buffer), len(self._buffer))
        end = len(self._buffer.rstrip()) - 1
        return _Cut(end, len(self._buffer), last=True) if self._buffer[end : end + 1] == b"]" else None

    def _guess_cut(self, last: bool) -> _Cut | None:
        """Cut after the last line, or before the last object that begins like the first one."""
        if self._ndjson:
            end = self._buffer.rfind(b"\n", 0, self._max_size) + 1 or self._buffer.find(b"\n", self._max_size) + 1
            if not end and last:
                end = len(self._buffer)
            return _Cut(end, end) if 0 < end <= self._item_bytes else None
        if head := _HEAD.match(self._buffer, len(self._buffer) - len(self._buffer.lstrip())):
            between = re.compile(rb"\}\s*+,\s*+(?=" + re.escape(head[0]) + rb")")
            for start in (max(self._max_size - _GUESS_WITHIN, 0), 0):
                match = None
                for match in between.finditer(self._buffer, start, self._max_size):  # noqa: B007 - the last one counts
                    pass
                if match:
                    return _Cut(match.start() + 1, match.end())
        return None

    def _exact_cut(self) -> _Cut | None:
        """Cut at a comma between two items, or at the array's end, scanning no further than necessary. Return None for
        a short array that is incomplete."""
        depth = items = end = 0
        cut = None
        buffer = self._buffer
        while mark := (_TO_BRACKET if depth else _TO_COMMA).match(buffer, end):
            end = mark.end()
            at = end - 1
            if step := _DEPTH.get(buffer[at], 0):
                depth += step
                if depth > _MAX_DEPTH:
                    return None
                if depth >= 0:
                    continue
            if cut and at > self._block_bytes:
                return cut
            if depth < 0:
                return _Cut(at, end, last=True) if buffer[at] == _END else None
            cut, items = _Cut(at, end), items + 1
            if items >= self._items_most or at >= self._block_bytes // 4:
                return cut
        return cut if len(buffer) >= self._block_bytes else None

    def _cut_lines(self) -> _Cut | None:
        """Cut after as many lines as one block may have, if the buffer holds more."""
        lines = self._buffer[: self._max_size].split(b"\n", self._items_most)
        if len(lines) <= self._items_most:
            return None
        end = min(len(self._buffer), self._max_size) - len(lines[-1])
        return _Cut(end, end)

    # ---- the block ----------------------------------------------------------------------------------------------

    def _cut(self, cut: _Cut) -> Parsed:
        with memoryview(self._buffer) as held, held[: cut.end] as view:
            block = bytes(view) if self._ndjson else b"".join((b"[", view, b"]"))
        if cut.last:
            self._check_end(cut.rest)
            if self.items and not block[1:-1].strip():
                raise Refused([FieldError("", "is not JSON: no item follows the last comma")], 400)
        parsed = self._parse(block, bool(self._ndjson))
        del self._buffer[: cut.rest]
        self._ended = cut.last
        self.items += len(parsed)
        self._retry_at = self._block_bytes
        self._max_size = min(self._block_bytes, max(cut.end * self._items_most // max(len(parsed), 1), 1024))
        return parsed

    def _check_end(self, at: int = 0) -> None:
        """Raise Refused if anything but blanks follows the end of the array."""
        if self._buffer[at:].strip():
            raise Refused([FieldError("", f"is not JSON: data follows its end, after {self.items} items")], 400)
        if self._ended:
            self._buffer.clear()

    def _incomplete(self) -> list[FieldError]:
        return [FieldError("", f"is not JSON: it ends within heartbeat {self.items}, or after it")]
