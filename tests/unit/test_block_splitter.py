"""A list of any form, however its bytes arrive, is cut into bounded blocks that hold its items unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexhb.heartbeat import FieldError, Refused
from nexhb.ingest.block_splitter import BlockSplitter

MAX_ITEMS = 40


class Recorder:
    """Record the blocks that the parser receives, and how much the buffer held."""

    def __init__(self, **bounds: int) -> None:
        self.splitter = BlockSplitter(
            self.parse, **{"block_bytes": 256, "item_bytes": 256, "max_items": MAX_ITEMS} | bounds
        )
        self.tries: list[bytes] = []
        self.blocks: list[list[Any]] = []
        self.held = 0

    def parse(self, block: bytes, ndjson: bool) -> list[Any]:
        self.tries.append(block)
        try:
            items = [json.loads(line) for line in block.split(b"\n") if line.strip()] if ndjson else json.loads(block)
        except (ValueError, RecursionError) as error:
            raise Refused([FieldError("", f"is not JSON: {error}")], 400) from None
        if len(items) > MAX_ITEMS:
            raise Refused([FieldError("", "too many at once")], 413)
        return list(items)

    def all_of(self, chunks: Iterable[bytes]) -> list[Any]:
        for chunk in chunks:
            self.splitter.feed(chunk)
            self.drain()
        self.drain(last=True)
        items = [item for block in self.blocks for item in block]
        assert self.splitter.items == len(items)
        return items

    def drain(self, *, last: bool = False) -> None:
        while (block := self.splitter.next_block(last=last)) is not None:
            self.blocks.append(block)
        self.held = max(self.held, len(self.splitter._buffer))


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[at : at + size] for at in range(0, len(body), size))


def refusal(body: bytes, size: int = 50, **bounds: int) -> tuple[Recorder, Refused]:
    recorder = Recorder(**bounds)
    with pytest.raises(Refused) as caught:
        recorder.all_of(pieces(body, size))
    return recorder, caught.value


words = st.text(max_size=8) | st.sampled_from(['"', "\\", "}, {", '},{"a":', "[", "]", '\\"', ","])
scalars = st.none() | st.booleans() | st.integers() | words
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3))
alike = st.fixed_dictionaries({"a": values, "b": st.lists(st.fixed_dictionaries({"a": scalars}), max_size=3)})
lists = st.lists(values, max_size=60) | st.lists(alike, max_size=60)
blank = st.text(" \t\r\n", max_size=3).map(str.encode)
chunkings = st.lists(st.integers(1, 300), min_size=1, max_size=20)


def chunked(body: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = turn = 0
    while at < len(body):
        step = sizes[turn % len(sizes)]
        yield body[at : at + step]
        at, turn = at + step, turn + 1


@settings(max_examples=400, deadline=None)
@given(lists, st.sampled_from([None, 1]), st.tuples(blank, blank, blank, blank), st.booleans(), chunkings)
def test_an_array_fed_in_chunks_of_any_size_yields_its_items_in_order(
    items: list[Any], indent: int | None, blanks: tuple[bytes, ...], bom: bool, sizes: list[int]
) -> None:
    texts = [json.dumps(item, indent=indent).encode() for item in items]
    before, after, first, end = blanks
    body = (b"\xef\xbb\xbf" if bom else b"") + first + b"[" + before + (before + b"," + after).join(texts)
    recorder = Recorder(item_bytes=20_000)
    assert recorder.all_of(chunked(body + after + b"]" + end, sizes)) == items
    largest = max(map(len, texts), default=0)
    assert all(len(block) <= max(256, largest + 16) + 2 for block in recorder.tries)
    assert recorder.held <= 2 * max(256, largest + 16) + 300


@settings(max_examples=200, deadline=None)
@given(lists, st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n\t\n"]), st.booleans(), st.booleans(), chunkings)
def test_lines_fed_in_chunks_of_any_size_yield_their_items_in_order(
    items: list[Any], newline: bytes, bom: bool, ended: bool, sizes: list[int]
) -> None:
    items = [item for item in items if not isinstance(item, list)] if isinstance(next(iter(items), 0), list) else items
    texts = [json.dumps(item).encode() for item in items]
    body = (b"\xef\xbb\xbf" if bom else b"") + newline.join(texts) + (newline if ended else b"")
    recorder = Recorder(item_bytes=20_000)
    assert recorder.all_of(chunked(body, sizes)) == items
    largest = max(map(len, texts), default=0)
    assert all(len(block) <= max(256, largest + 16) for block in recorder.tries)
    assert recorder.held <= 2 * max(256, largest + 16) + 300


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600) | lists.map(lambda items: json.dumps(items).encode()), st.integers(0, 700), chunkings)
def test_a_body_is_accepted_as_an_array_only_if_it_is_one(body: bytes, cut: int, sizes: list[int]) -> None:
    body = b"[" + body[1:cut]
    try:
        items = json.loads(body)
    except (ValueError, RecursionError):
        with pytest.raises(Refused) as caught:
            Recorder(item_bytes=20_000).all_of(chunked(body, sizes))
        assert caught.value.status == 400
    else:
        assert Recorder(item_bytes=20_000).all_of(chunked(body, sizes)) == items


def beat(number: int, **more: Any) -> dict[str, Any]:
    return {"number": number, "text": "x" * 20} | more


def test_bodies_of_devices_are_cut_at_the_first_try() -> None:
    items = [beat(n, hints=[{"a": 1}, {"b": 2}]) for n in range(200)]
    for body in (json.dumps(items), json.dumps(items, separators=(",", ":")), "\n".join(map(json.dumps, items))):
        recorder = Recorder()
        assert recorder.all_of(pieces(body.encode(), 100)) == items
        assert len(recorder.tries) == len(recorder.blocks)


def test_a_wrong_guess_costs_one_more_try_and_loses_no_item() -> None:
    items = [beat(n, inner=[beat(m) for m in range(3)]) for n in range(50)]
    recorder = Recorder(block_bytes=1_000)
    assert recorder.all_of(pieces(json.dumps(items).encode(), 100)) == items
    assert len(recorder.blocks) < len(recorder.tries) <= 2 * len(recorder.blocks)


def test_a_block_has_at_most_max_items_and_the_next_block_is_sized_by_them() -> None:
    for body in (b"[" + b"1," * 5_000 + b"1]", b"1\n" * 5_001):
        recorder = Recorder(block_bytes=4_000, item_bytes=4_000)
        assert recorder.all_of(pieces(body, 1_000)) == [1] * 5_001
        assert max(map(len, recorder.blocks)) <= MAX_ITEMS


@pytest.mark.parametrize("body", [b"", b" \r\n\t", b"[]", b" [ ] \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf[]"])
@pytest.mark.parametrize("size", [1, 100])
def test_an_empty_body_is_an_empty_list(body: bytes, size: int) -> None:
    assert Recorder().all_of(pieces(body, size)) == []


@pytest.mark.parametrize(
    "body",
    [
        b"[",
        b"[1",
        b"[1,",
        b"[1,]",
        b"[1]x",
        b"[1]]",
        b"[1],",
        b"[1 2]",
        b"[1}",
        b"[no]",
        b"[\xff]",
        b'["]',
        b"[" * 5000,
    ],
)
@pytest.mark.parametrize("items_before", [0, 30, 2_000])
def test_a_broken_array_is_refused_wherever_it_breaks(body: bytes, items_before: int) -> None:
    before = [beat(n) for n in range(items_before)]
    whole = b"[" + json.dumps(before)[1:-1].encode() + (b"," if before else b"") + body[1:]
    recorder, refused = refusal(whole, item_bytes=10_000)
    assert refused.status == 400
    assert refused.errors[0].message
    items = [item for block in recorder.blocks for item in block]
    assert items[:items_before] == before[: len(items)]
    assert len(items) >= items_before - 20


def test_data_after_the_end_is_refused_even_if_it_arrives_later() -> None:
    recorder = Recorder()
    recorder.splitter.feed(b"[" + b"1," * 300 + b"1]   ")
    recorder.drain()
    recorder.splitter.feed(b" \n")
    with pytest.raises(Refused):
        recorder.all_of([b"x"])


@pytest.mark.parametrize("body", [b'[1,{"a":"' + b"x" * 5_000, b'1\n{"a":"' + b"x" * 5_000, b"[" + b" " * 5_000])
def test_an_item_that_is_too_large_is_refused_by_its_index_before_all_of_it_has_arrived(body: bytes) -> None:
    recorder, refused = refusal(body)
    assert refused.status == 413
    assert refused.errors[0].message == f"heartbeat {recorder.splitter.items} takes more than 256 bytes"
    assert recorder.held <= 306


@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_large_item_is_scanned_only_a_few_times_however_slowly_it_arrives(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for a place to cut costs time, as parsing does: a search after each chunk of 7 bytes would scan 180 MB
    for this item of 50 kB."""
    searched: list[int] = []
    for search in ("_exact_cut", "_cut_lines", "_guess_cut"):
        search_for_cut = getattr(BlockSplitter, search)

        def counted(self: BlockSplitter[Any], *args: Any, search_for_cut: Any = search_for_cut) -> Any:
            searched.append(len(self._buffer))
            return search_for_cut(self, *args)

        monkeypatch.setattr(BlockSplitter, search, counted)
    recorder = Recorder(item_bytes=100_000)
    item = {"a": "x" * 50_000}
    body = json.dumps([item, 1]) if form == "array" else f"{json.dumps(item)}\n1"
    assert recorder.all_of(pieces(body.encode(), 7)) == [item, 1]
    assert sum(map(len, recorder.tries)) < 200_000
    assert sum(searched) < 500_000


def test_a_block_is_sized_by_the_items_before_it_so_that_few_parses_fail() -> None:
    """A block of 40 kB would hold 600 of these items, but only 40 are allowed: the first attempt to parse each block
    would fail."""
    items = [beat(n) for n in range(1_000)]
    for body in (json.dumps(items), "\n".join(map(json.dumps, items))):
        recorder = Recorder(block_bytes=40_000, item_bytes=40_000)
        assert recorder.all_of(pieces(body.encode(), 5_000)) == items
        assert len(recorder.tries) <= len(recorder.blocks) + 3


def test_the_search_for_a_cut_extends_no_further_than_a_quarter_of_a_block() -> None:
    """These items all begin differently, so the place to cut cannot be guessed, and the search costs 10 µs per
    heartbeat."""
    items = [{f"a{n}": "x" * 20} for n in range(400)]
    recorder = Recorder(block_bytes=4_000, item_bytes=4_000)
    assert recorder.all_of(pieces(json.dumps(items).encode(), 500)) == items
    *blocks, _last = recorder.tries
    assert max(map(len, blocks)) <= 1_000 + 40
