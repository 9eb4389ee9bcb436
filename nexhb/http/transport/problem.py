"""Error responses as problem details (RFC 9457), and the JSON of all responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from nexhb.heartbeat import FieldError

_JSON = msgspec.json.Encoder(enc_hook=str)  # not orjson, which cannot encode the rows of `reads`


def dumps(value: object) -> bytes:
    """Return the value as JSON, with datetimes in RFC 3339 with Z, and addresses as text."""
    return _JSON.encode(value)


SERVER = {"Server": "nexhb"}  # aiohttp's own header would show the versions of Python and aiohttp


def json_response(value: object, status: int = 200) -> web.Response:
    """Return a JSON response."""
    return web.Response(body=dumps(value), status=status, content_type="application/json", headers=SERVER)


class Problem(Exception):
    """A response other than 2xx. `errors` name the fields of a refused body."""

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
        self.close = close  # close the connection instead of reading the rest of the request
        super().__init__(detail)

    def response(self) -> web.Response:
        """Return the response, of type application/problem+json."""
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
