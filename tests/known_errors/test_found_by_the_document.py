"""docs/openapi.yaml was written, and held against the daemon by a generator of calls. POST /ops/enrolment-keys refused
86400.0 where it takes 86400, which JSON does not tell apart. And every error, /metrics and a heartbeat's answer on a
connection that closes told the versions of Python and aiohttp, which all other answers leave out."""

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
async def test_a_whole_number_is_one_however_it_is_written(nexhb: Nexhb, body: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json", **ADMIN}
    async with nexhb.http.post(f"{nexhb.url}/ops/enrolment-keys", data=body, headers=headers) as response:
        assert response.status == status
        if status == 200:
            assert b'"uses":3,' in await response.read()


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/v1/fleet", "/nothing", "/v1/devices/nobody"])
async def test_no_answer_tells_the_versions_of_what_it_is_made_with(nexhb: Nexhb, path: str) -> None:
    for headers in (ADMIN, {}):
        async with nexhb.http.get(nexhb.url + path, headers=headers) as response:
            assert response.headers["Server"] == "nexhb"


async def test_nor_does_that_of_a_heartbeat_on_a_connection_that_closes(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    answer = await agent.post(orjson.dumps(example(now)), Connection="close")
    assert (answer.status, answer.headers["Server"]) == (200, "nexhb")
