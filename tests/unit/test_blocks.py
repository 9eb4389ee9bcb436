"""Blocks: whatever the list looks like and however it arrives, its items come out as they are, in bounded blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexhb.blocks import Blocks
from nexhb.wire import FieldError, Refused

MOST = 40


class Taken:
    """What a parser sees, and how much."""

    def __init__(self, **bounds: int) -> None:
        self.blocks = Blocks(self.parse, **{"block_bytes": 256, "item_bytes": 256, "items_most": MOST} | bounds)
        self.tries: list[bytes] = []
        self.found: list[list[Any]] = []
        self.held = 0

    def parse(self, block: bytes, ndjson: bool) -> list[Any]:
        self.tries.append(block)
        try:
            items = [json.loads(line) for line in block.split(b"\n") if line.strip()] if ndjson else json.loads(block)
        except (ValueError, RecursionError) as error:
            raise Refused([FieldError("", f"is not JSON: {error}")], 400) from None
        if len(items) > MOST:
            raise Refused([FieldError("", "too many at once")], 413)
        return list(items)

    def all_of(self, chunks: Iterable[bytes]) -> list[Any]:
        for chunk in chunks:
            self.blocks.feed(chunk)
            self.take()
        self.take(last=True)
        items = [item for block in self.found for item in block]
        assert self.blocks.items == len(items)
        return items

    def take(self, *, last: bool = False) -> None:
        while (block := self.blocks.take(last=last)) is not None:
            self.found.append(block)
        self.held = max(self.held, len(self.blocks._buffer))


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[at : at + size] for at in range(0, len(body), size))


def refusal(body: bytes, size: int = 50, **bounds: int) -> tuple[Taken, Refused]:
    taken = Taken(**bounds)
    with pytest.raises(Refused) as caught:
        taken.all_of(pieces(body, size))
    return taken, caught.value


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
def test_an_array_in_whatever_pieces_gives_its_items_in_order(
    items: list[Any], indent: int | None, blanks: tuple[bytes, ...], bom: bool, sizes: list[int]
) -> None:
    texts = [json.dumps(item, indent=indent).encode() for item in items]
    before, behind, first, end = blanks
    body = (b"\xef\xbb\xbf" if bom else b"") + first + b"[" + before + (before + b"," + behind).join(texts)
    taken = Taken(item_bytes=20_000)
    assert taken.all_of(chunked(body + behind + b"]" + end, sizes)) == items
    largest = max(map(len, texts), default=0)
    assert all(len(block) <= max(256, largest + 16) + 2 for block in taken.tries)
    assert taken.held <= 2 * max(256, largest + 16) + 300


@settings(max_examples=200, deadline=None)
@given(lists, st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n\t\n"]), st.booleans(), st.booleans(), chunkings)
def test_lines_in_whatever_pieces_give_their_items_in_order(
    items: list[Any], newline: bytes, bom: bool, ended: bool, sizes: list[int]
) -> None:
    items = [item for item in items if not isinstance(item, list)] if isinstance(next(iter(items), 0), list) else items
    texts = [json.dumps(item).encode() for item in items]
    body = (b"\xef\xbb\xbf" if bom else b"") + newline.join(texts) + (newline if ended else b"")
    taken = Taken(item_bytes=20_000)
    assert taken.all_of(chunked(body, sizes)) == items
    largest = max(map(len, texts), default=0)
    assert all(len(block) <= max(256, largest + 16) for block in taken.tries)
    assert taken.held <= 2 * max(256, largest + 16) + 300


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600) | lists.map(lambda items: json.dumps(items).encode()), st.integers(0, 700), chunkings)
def test_an_array_is_taken_whole_only_where_it_is_one(body: bytes, cut: int, sizes: list[int]) -> None:
    body = b"[" + body[1:cut]
    try:
        items = json.loads(body)
    except (ValueError, RecursionError):
        with pytest.raises(Refused) as caught:
            Taken(item_bytes=20_000).all_of(chunked(body, sizes))
        assert caught.value.status == 400
    else:
        assert Taken(item_bytes=20_000).all_of(chunked(body, sizes)) == items


def beat(number: int, **more: Any) -> dict[str, Any]:
    return {"number": number, "text": "x" * 20} | more


def test_what_devices_send_is_cut_at_the_first_try() -> None:
    items = [beat(n, hints=[{"a": 1}, {"b": 2}]) for n in range(200)]
    for body in (json.dumps(items), json.dumps(items, separators=(",", ":")), "\n".join(map(json.dumps, items))):
        taken = Taken()
        assert taken.all_of(pieces(body.encode(), 100)) == items
        assert len(taken.tries) == len(taken.found)


def test_a_guess_that_was_wrong_costs_one_more_try_and_no_item() -> None:
    items = [beat(n, inner=[beat(m) for m in range(3)]) for n in range(50)]
    taken = Taken(block_bytes=1_000)
    assert taken.all_of(pieces(json.dumps(items).encode(), 100)) == items
    assert len(taken.found) < len(taken.tries) <= 2 * len(taken.found)


def test_a_block_holds_no_more_items_than_it_may_and_the_next_one_knows_their_size() -> None:
    for body in (b"[" + b"1," * 5_000 + b"1]", b"1\n" * 5_001):
        taken = Taken(block_bytes=4_000, item_bytes=4_000)
        assert taken.all_of(pieces(body, 1_000)) == [1] * 5_001
        assert max(map(len, taken.found)) <= MOST


@pytest.mark.parametrize("body", [b"", b" \r\n\t", b"[]", b" [ ] \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf[]"])
@pytest.mark.parametrize("size", [1, 100])
def test_nothing_is_a_list_of_none(body: bytes, size: int) -> None:
    assert Taken().all_of(pieces(body, size)) == []


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
@pytest.mark.parametrize("behind", [0, 30, 2_000])
def test_what_is_no_array_is_refused_wherever_it_breaks_off(body: bytes, behind: int) -> None:
    before = [beat(n) for n in range(behind)]
    whole = b"[" + json.dumps(before)[1:-1].encode() + (b"," if before else b"") + body[1:]
    taken, refused = refusal(whole, item_bytes=10_000)
    assert refused.status == 400
    assert refused.errors[0].message
    items = [item for block in taken.found for item in block]
    assert items[:behind] == before[: len(items)]
    assert len(items) >= behind - 20


def test_something_behind_the_end_is_refused_also_when_it_comes_later() -> None:
    taken = Taken()
    taken.blocks.feed(b"[" + b"1," * 300 + b"1]   ")
    taken.take()
    taken.blocks.feed(b" \n")
    with pytest.raises(Refused):
        taken.all_of([b"x"])


@pytest.mark.parametrize("body", [b'[1,{"a":"' + b"x" * 5_000, b'1\n{"a":"' + b"x" * 5_000, b"[" + b" " * 5_000])
def test_an_item_that_is_too_large_is_refused_by_its_place_before_it_is_there(body: bytes) -> None:
    taken, refused = refusal(body)
    assert refused.status == 413
    assert refused.errors[0].message == f"heartbeat {taken.blocks.items} takes more than 256 bytes"
    assert taken.held <= 306


@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_large_item_is_looked_at_a_few_times_only_however_slowly_it_comes(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted is what is searched for a place to cut, and not only what is parsed: at each piece of 7 bytes it
    would be 180 MB of these 50 kB."""
    searched: list[int] = []
    for search in ("_exact", "_lines", "_guess"):
        looks = getattr(Blocks, search)

        def counted(self: Blocks[Any], *args: Any, looks: Any = looks) -> Any:
            searched.append(len(self._buffer))
            return looks(self, *args)

        monkeypatch.setattr(Blocks, search, counted)
    taken = Taken(item_bytes=100_000)
    item = {"a": "x" * 50_000}
    body = json.dumps([item, 1]) if form == "array" else f"{json.dumps(item)}\n1"
    assert taken.all_of(pieces(body.encode(), 7)) == [item, 1]
    assert sum(map(len, taken.tries)) < 200_000
    assert sum(searched) < 500_000


def test_a_block_is_as_large_as_the_items_before_it_allow_and_not_parsed_in_vain() -> None:
    """A block of 40 kB holds 600 of these where 40 may be: each would be parsed and thrown away first."""
    items = [beat(n) for n in range(1_000)]
    for body in (json.dumps(items), "\n".join(map(json.dumps, items))):
        taken = Taken(block_bytes=40_000, item_bytes=40_000)
        assert taken.all_of(pieces(body.encode(), 5_000)) == items
        assert len(taken.tries) <= len(taken.found) + 3


def test_a_place_to_cut_is_searched_no_further_than_a_quarter_of_a_block() -> None:
    """Items that do not begin alike: nothing can be guessed, and the search costs 10 µs a heartbeat."""
    items = [{f"a{n}": "x" * 20} for n in range(400)]
    taken = Taken(block_bytes=4_000, item_bytes=4_000)
    assert taken.all_of(pieces(json.dumps(items).encode(), 500)) == items
    *blocks, _last = taken.tries
    assert max(map(len, blocks)) <= 1_000 + 40
