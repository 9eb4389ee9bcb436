"""Differences between docs/openapi.yaml and the daemon, found by a generator of requests. Formerly, POST
/ops/enrolment-keys rejected 86400.0 but accepted 86400, which are the same in JSON; and every error, /metrics and the
response to a heartbeat on a closing connection exposed the versions of Python and aiohttp."""

from __future__ import annotations

from datetime import datetime

import orjson
import pytest

from tests.conftest import ADMIN_KEY, Nexhb, example

ADMIN = {"x-admin": ADMIN_KEY}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"uses":3.0,"expires_in_seconds":8.64e4}', 200),
        (b'{"uses":3,"expires_in_seconds":86400}', 200),
        (b'{"uses":3.5}', 422),
        (b'{"uses":1e300}', 422),
        (b'{"uses":100000000000000000000000000}', 422),
        (b'{"expires_in_seconds":59.999}', 422),
        (b'{"uses":"3"}', 400),
        (b'{"uses":true}', 400),
    ],
)
async def test_an_integer_is_accepted_with_or_without_a_decimal_point(nexhb: Nexhb, body: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json", **ADMIN}
    async with nexhb.http.post(f"{nexhb.url}/ops/enrolment-keys", data=body, headers=headers) as response:
        assert response.status == status
        if status == 200:
            assert b'"uses":3,' in await response.read()


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/v1/fleet", "/nothing", "/v1/devices/nobody"])
async def test_no_response_exposes_the_versions_of_its_libraries(nexhb: Nexhb, path: str) -> None:
    for headers in (ADMIN, {}):
        async with nexhb.http.get(nexhb.url + path, headers=headers) as response:
            assert response.headers["Server"] == "nexhb"


async def test_the_response_on_a_closing_connection_exposes_no_versions(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    answer = await agent.post(orjson.dumps(example(now)), Connection="close")
    assert (answer.status, answer.headers["Server"]) == (200, "nexhb")
