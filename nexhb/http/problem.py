"""Errors as RFC 9457 problem details, and the JSON of every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from nexhb.wire import FieldError

_JSON = msgspec.json.Encoder(enc_hook=str)  # it knows reads' rows, which orjson does not


def dumps(value: object) -> bytes:
    """JSON; datetimes in RFC 3339 with Z, addresses as text."""
    return _JSON.encode(value)


SERVER = {"Server": "nexhb"}  # and not which Python and aiohttp answer


def answer(value: object, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=dumps(value), status=status, content_type="application/json", headers=SERVER)


class Problem(Exception):
    """An answer other than 2xx. `errors` name the fields of a refused body."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        self.status = status
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}
        self.close = close  # the rest of the request is not wanted
        super().__init__(detail)

    def response(self) -> web.Response:
        """As application/problem+json."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = [{"path": e.path, "message": e.message} for e in self.errors]
        response = web.Response(
            body=dumps(body),
            status=self.status,
            content_type="application/problem+json",
            headers={**SERVER, **self.headers},
        )
        if self.close:
            response.force_close()
        return response
