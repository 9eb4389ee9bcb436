"""A list of heartbeats cut into blocks while it arrives. Pure: who reads it feeds it.

Where a block ends is guessed, and what is to be made of it anyhow is the proof: JSON is read from left to right, so
`[` + what came so far + `]` is an array only where the cut lies between two items. The scan that does not guess costs
10 µs a heartbeat; the guess next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sized
from typing import Generic, NamedTuple, TypeVar

from nexhb.wire import FieldError, Refused

Parsed = TypeVar("Parsed", bound=Sized)

BLOCK_BYTES = 2**18  # 260 of the agent's heartbeats
ITEMS_MOST = 500  # in one block: 2 to 3 ms of the event loop's time

_BOM = b"\xef\xbb\xbf"
_GUESS_WITHIN = 2**14
_HEAD = re.compile(rb'\{\s*+"[^"\\]{1,100}"\s*+:')
# Up to the next mark, over strings; one that does not end (yet) reaches to the end, and no mark is behind it.
_TO_MARK = rb'(?:[^"%b]++|"(?:[^"\\]++|\\.)*+(?:"|\\?\Z))*+[%b]'
_TO_BRACKET = re.compile(_TO_MARK.replace(b"%b", rb"\[\]{}"), re.DOTALL)
_TO_COMMA = re.compile(_TO_MARK.replace(b"%b", rb"\[\]{},"), re.DOTALL)
_END = ord("]")
_DEEPEST = 1_000  # deeper, no parser follows
_DEPTH = dict(zip(b"[{]}", (1, 1, -1, -1), strict=True))


class _Cut(NamedTuple):
    """The block is buffer[:end]; from `rest` on it is not part of it. `last`: the array ends here."""

    end: int
    rest: int
    last: bool = False


class Blocks(Generic[Parsed]):
    """A JSON array, or one item a line (NDJSON). Which it is, its first character says: a client that names the wrong
    type, or none, must not find its queue refused and deleted.

    `parse(block, ndjson)` makes something of one block, an array or lines, with a length in items; it raises Refused
    where that is no JSON, or more than `items_most`, and has done nothing then. Blocks of lines may begin or end with
    blank ones. No block is larger than `block_bytes` (but one item may be, up to `item_bytes`), and no more is held
    than that and what is fed at once.
    """

    def __init__(
        self,
        parse: Callable[[bytes, bool], Parsed],
        *,
        item_bytes: int,
        block_bytes: int = BLOCK_BYTES,
        items_most: int = ITEMS_MOST,
    ) -> None:
        self.items = 0  # in the blocks that were taken
        self._parse = parse
        self._item_bytes = max(item_bytes, block_bytes)
        self._block_bytes = block_bytes
        self._items_most = items_most
        self._size = block_bytes  # of the next block, at most: what `items_most` of the last one's items would take
        self._enough = block_bytes  # held before another cut is tried
        self._buffer = bytearray()
        self._ndjson: bool | None = None
        self._fresh = True  # not one byte but a BOM and blanks so far
        self._ended = False

    def feed(self, chunk: bytes) -> None:
        """What came. Raises Refused where the array has ended already."""
        self._buffer += chunk
        if self._ended:
            self._nothing_follows()

    def take(self, *, last: bool = False) -> Parsed | None:
        """The next block, or None where there is none, or not yet. To be called until it says so. `last`: nothing more
        will be fed.

        Raises Refused: 400 where it is no list, or breaks off; 413 where an item is too large.
        """
        if self._ended or not self._decide(last):
            return None
        held = len(self._buffer)
        if last and self._ndjson and not self._buffer.strip():
            return None
        if last and held <= self._size:
            guess = self._rest()
        elif last or held >= self._enough:
            guess = self._guess(last)
        else:
            return None
        # Not the refusal itself: its traceback would hold this frame, and the block, until the collector comes.
        errors, status = self._broke_off(), 400
        if guess:
            try:
                return self._cut(guess)
            except Refused as error:
                errors, status = error.errors, error.status
        if exact := self._lines() if self._ndjson else self._exact():
            return self._cut(exact)
        if last and held <= self._item_bytes:
            raise Refused(errors, status)
        if held > self._item_bytes:
            raise Refused([FieldError("", f"heartbeat {self.items} takes more than {self._item_bytes} bytes")], 413)
        self._enough = 2 * held  # not at each byte of a large item again
        return None

    def _decide(self, last: bool) -> bool:
        """Which of the two it is; False while there were only blanks."""
        if self._ndjson is not None:
            return True
        if self._fresh and not last and len(self._buffer) < len(_BOM) and _BOM.startswith(bytes(self._buffer)):
            return False
        if self._fresh and self._buffer.startswith(_BOM):
            del self._buffer[: len(_BOM)]
        self._fresh = self._fresh and not self._buffer
        del self._buffer[: len(self._buffer) - len(self._buffer.lstrip())]
        if not self._buffer:
            return False
        self._ndjson = not self._buffer.startswith(b"[")
        if not self._ndjson:
            del self._buffer[:1]
        return True

    # ---- where to cut -------------------------------------------------------------------------------------------

    def _rest(self) -> _Cut | None:
        if self._ndjson:
            return _Cut(len(self._buffer), len(self._buffer))
        end = len(self._buffer.rstrip()) - 1
        return _Cut(end, len(self._buffer), last=True) if self._buffer[end : end + 1] == b"]" else None

    def _guess(self, last: bool) -> _Cut | None:
        """Behind the last line; or before the last object that begins as the first one does."""
        if self._ndjson:
            end = self._buffer.rfind(b"\n", 0, self._size) + 1 or self._buffer.find(b"\n", self._size) + 1
            if not end and last:
                end = len(self._buffer)
            return _Cut(end, end) if 0 < end <= self._item_bytes else None
        if head := _HEAD.match(self._buffer, len(self._buffer) - len(self._buffer.lstrip())):
            between = re.compile(rb"\}\s*+,\s*+(?=" + re.escape(head[0]) + rb")")
            for start in (max(self._size - _GUESS_WITHIN, 0), 0):
                found = None
                for found in between.finditer(self._buffer, start, self._size):  # noqa: B007 - the last
                    pass
                if found:
                    return _Cut(found.start() + 1, found.end())
        return None

    def _exact(self) -> _Cut | None:
        """Behind a comma between two items, or at the array's end; looks no further than it must. Of a short array
        that breaks off, nothing."""
        depth = items = end = 0
        cut = None
        buffer = self._buffer
        while mark := (_TO_BRACKET if depth else _TO_COMMA).match(buffer, end):
            end = mark.end()
            at = end - 1
            if step := _DEPTH.get(buffer[at], 0):
                depth += step
                if depth > _DEEPEST:
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

    def _lines(self) -> _Cut | None:
        """Behind as many lines as there may be in one block, where there are more."""
        lines = self._buffer[: self._size].split(b"\n", self._items_most)
        if len(lines) <= self._items_most:
            return None
        end = min(len(self._buffer), self._size) - len(lines[-1])
        return _Cut(end, end)

    # ---- the block ----------------------------------------------------------------------------------------------

    def _cut(self, cut: _Cut) -> Parsed:
        with memoryview(self._buffer) as held, held[: cut.end] as view:
            block = bytes(view) if self._ndjson else b"".join((b"[", view, b"]"))
        if cut.last:
            self._nothing_follows(cut.rest)
            if self.items and not block[1:-1].strip():
                raise Refused([FieldError("", "is not JSON: a comma, and nothing behind it")], 400)
        parsed = self._parse(block, bool(self._ndjson))
        del self._buffer[: cut.rest]
        self._ended = cut.last
        self.items += len(parsed)
        self._enough = self._block_bytes
        self._size = min(self._block_bytes, max(cut.end * self._items_most // max(len(parsed), 1), 1024))
        return parsed

    def _nothing_follows(self, at: int = 0) -> None:
        if self._buffer[at:].strip():
            raise Refused([FieldError("", f"is not JSON: something follows its end, behind {self.items} items")], 400)
        if self._ended:
            self._buffer.clear()

    def _broke_off(self) -> list[FieldError]:
        return [FieldError("", f"is not JSON: it ends within heartbeat {self.items}, or behind it")]
