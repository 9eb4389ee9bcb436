"""Query parameters: which values are accepted, and how errors name the parameter."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from nexhb.http.transport import query
from nexhb.http.transport.problem import Problem

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def get(**parameters: str) -> web.Request:
    """Return a GET with these parameters."""
    return make_mocked_request("GET", "/x?" + "&".join(f"{name}={quote(v)}" for name, v in parameters.items()))


def refused(ask: Callable[[], object]) -> Problem:
    """Return the problem (the body of the error response) with which the call is refused."""
    with pytest.raises(Problem) as caught:
        ask()
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("text", ["0", "101", "-1", "+1", "1.0", "", " 5", "\u0665", "1" * 5_000, "0000000000005"])
def test_a_number_has_only_ascii_digits(text: str) -> None:
    """int() accepts digits of any script, and raises ValueError for thousands of digits."""
    problem = refused(lambda: query.number(get(limit=text), "limit", 10, 1, 100))
    assert problem.errors[0].path == "limit"


def test_the_limits_of_a_number_are_inclusive() -> None:
    assert [query.number(get(limit=text), "limit", 10, 1, 100) for text in ("1", "100", "007")] == [1, 100, 7]
    assert query.number(get(), "limit", 10, 1, 100) == 10


@pytest.mark.parametrize(
    "text", ["nightly", "nightly:", "nightly:x", "nightly:1,", "N:1", "a:1" + ",a:1" * 300, "a:" + "1" * 16, "a:\u0661"]
)
def test_an_invalid_position_is_refused(text: str) -> None:
    assert refused(lambda: query.job_runs(get(after=text), "after")).errors[0].path == "after"


def test_a_position_has_a_run_of_each_job() -> None:
    assert query.job_runs(get(after="nightly:120,reconcile:88"), "after") == {"nightly": 120, "reconcile": 88}
    assert query.job_runs(get(), "after") is None


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-24T12:00:00Z", NOON),
        ("2026-11-24T13:00:00+01:00", NOON),
        ("2026-11-24T13:00:00 01:00", NOON),  # an unescaped "+"
        ("0001-01-01T00:00:00Z", datetime(1970, 1, 2, tzinfo=UTC)),
        ("0001-01-01T00:00:00+01:00", datetime(1970, 1, 2, tzinfo=UTC)),
        ("9999-12-31T23:59:59Z", datetime(2080, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59-01:00", datetime(2080, 1, 1, tzinfo=UTC)),
    ],
)
def test_a_time_needs_a_zone_and_is_limited_to_a_range_without_overflow(text: str, moment: datetime) -> None:
    assert query.moment(get(since=text), "since", NOON) == moment


@pytest.mark.parametrize(("text", "says"), [("2026-11-24T12:00:00", "time zone"), ("yesterday", "ISO"), ("", "ISO")])
def test_an_invalid_time_is_refused_by_name(text: str, says: str) -> None:
    [error] = refused(lambda: query.moment(get(since=text), "since", NOON)).errors
    assert (error.path, says in error.message) == ("since", True)


def test_a_text_is_limited_in_length_and_must_not_contain_nul() -> None:
    assert query.text(get(after="x" * 100), "after") == "x" * 100
    for text in ("x" * 101, "a\0b"):
        assert refused(lambda text=text: query.text(get(after=text), "after")).errors[0].path == "after"  # type: ignore[misc]


def test_a_boolean_is_true_false_or_refused() -> None:
    assert [query.boolean(get(dry_run=text), "dry_run") for text in ("", "1", "TRUE", "0", "False")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert query.boolean(get(), "dry_run") is False
    assert refused(lambda: query.boolean(get(dry_run="yes"), "dry_run")).errors[0].path == "dry_run"


def test_unknown_parameters_are_named_up_to_a_limit() -> None:
    query.check(get(limit="1", after="x"), ("limit", "after"))
    [error] = refused(lambda: query.check(get(dryrun="true"), ("dry_run",))).errors
    assert (error.path, "accepted parameters: dry_run" in error.message) == ("dryrun", True)
    [error] = refused(lambda: query.check(get(dryrun="true"), ())).errors
    assert "accepted parameters: none" in error.message
    twice = make_mocked_request("GET", "/x?limit=1&limit=2")
    assert refused(lambda: query.check(twice, ("limit",))).errors[0].message == "is given twice"
    many = refused(lambda: query.check(get(**{"x" * 5_000 + str(n): "" for n in range(50)}), ()))
    assert len(many.errors) == 10
    assert {len(error.path) for error in many.errors} == {100}
    assert len(many.detail) < 10 * 200
