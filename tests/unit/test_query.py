"""Query parameters: what is taken, what is refused by name, and how much of it is repeated."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from nexhb.http import query
from nexhb.http.problem import Problem

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def asked(**parameters: str) -> web.Request:
    """A GET with these parameters."""
    return make_mocked_request("GET", "/x?" + "&".join(f"{name}={quote(v)}" for name, v in parameters.items()))


def refused(ask: Callable[[], object]) -> Problem:
    """The problem with which it is refused."""
    with pytest.raises(Problem) as found:
        ask()
    assert found.value.status == 400
    return found.value


@pytest.mark.parametrize("text", ["0", "101", "-1", "+1", "1.0", "", " 5", "\u0665", "1" * 5_000, "0000000000005"])
def test_a_number_within_its_bounds_is_plain_digits(text: str) -> None:
    """int() accepts digits of any script, and raises ValueError for thousands of digits."""
    found = refused(lambda: query.number(asked(limit=text), "limit", 10, 1, 100))
    assert found.errors[0].path == "limit"


def test_the_bounds_of_a_number_are_of_it() -> None:
    assert [query.number(asked(limit=text), "limit", 10, 1, 100) for text in ("1", "100", "007")] == [1, 100, 7]
    assert query.number(asked(), "limit", 10, 1, 100) == 10


@pytest.mark.parametrize(
    "text", ["nightly", "nightly:", "nightly:x", "nightly:1,", "N:1", "a:1" + ",a:1" * 300, "a:" + "1" * 16, "a:\u0661"]
)
def test_what_no_page_gave_is_no_place_to_go_on_from(text: str) -> None:
    assert refused(lambda: query.runs(asked(after=text), "after")).errors[0].path == "after"


def test_a_place_to_go_on_from_is_a_run_of_each_job() -> None:
    assert query.runs(asked(after="nightly:120,reconcile:88"), "after") == {"nightly": 120, "reconcile": 88}
    assert query.runs(asked(), "after") is None


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-24T12:00:00Z", NOON),
        ("2026-11-24T13:00:00+01:00", NOON),
        ("2026-11-24T13:00:00 01:00", NOON),  # a "+" that was not escaped
        ("0001-01-01T00:00:00Z", datetime(1970, 1, 2, tzinfo=UTC)),
        ("0001-01-01T00:00:00+01:00", datetime(1970, 1, 2, tzinfo=UTC)),
        ("9999-12-31T23:59:59Z", datetime(2080, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59-01:00", datetime(2080, 1, 1, tzinfo=UTC)),
    ],
)
def test_a_moment_has_its_zone_and_lies_where_arithmetic_reaches(text: str, moment: datetime) -> None:
    assert query.moment(asked(since=text), "since", NOON) == moment


@pytest.mark.parametrize(("text", "says"), [("2026-11-24T12:00:00", "time zone"), ("yesterday", "ISO"), ("", "ISO")])
def test_what_is_no_moment_is_refused_by_name(text: str, says: str) -> None:
    [error] = refused(lambda: query.moment(asked(since=text), "since", NOON)).errors
    assert (error.path, says in error.message) == ("since", True)


def test_a_text_has_its_length_and_no_nul() -> None:
    assert query.text(asked(after="x" * 100), "after") == "x" * 100
    for text in ("x" * 101, "a\0b"):
        assert refused(lambda text=text: query.text(asked(after=text), "after")).errors[0].path == "after"  # type: ignore[misc]


def test_a_switch_is_on_off_or_refused() -> None:
    assert [query.switch(asked(dry_run=text), "dry_run") for text in ("", "1", "TRUE", "0", "False")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert query.switch(asked(), "dry_run") is False
    assert refused(lambda: query.switch(asked(dry_run="yes"), "dry_run")).errors[0].path == "dry_run"


def test_what_is_not_known_is_named_and_no_more_of_it_than_helps() -> None:
    query.check(asked(limit="1", after="x"), ("limit", "after"))
    [error] = refused(lambda: query.check(asked(dryrun="true"), ("dry_run",))).errors
    assert (error.path, "takes dry_run" in error.message) == ("dryrun", True)
    [error] = refused(lambda: query.check(asked(dryrun="true"), ())).errors
    assert "takes no parameters" in error.message
    twice = make_mocked_request("GET", "/x?limit=1&limit=2")
    assert refused(lambda: query.check(twice, ("limit",))).errors[0].message == "is given twice"
    many = refused(lambda: query.check(asked(**{"x" * 5_000 + str(n): "" for n in range(50)}), ()))
    assert len(many.errors) == 10
    assert {len(error.path) for error in many.errors} == {100}
    assert len(many.detail) < 10 * 200
