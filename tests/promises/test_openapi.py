"""docs/openapi.yaml is true: its routes are the daemon's, and every call is answered as it says, whatever is sent."""

from __future__ import annotations

import asyncio
import copy
import http.client
import io
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import openapi_spec_validator
import orjson
import pytest
import requests
import schemathesis
import yaml
from pydantic import SecretStr
from schemathesis.specs.openapi import checks

from nexhb import __version__, devices, metrics
from nexhb.config import Auth, Ingest, Server, Settings
from nexhb.db import Database
from nexhb.http.app import ROUTES, make_app
from nexhb.http.parts import Parts
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon
from tests.integration.test_bad_input import raw
from tests.proxy import Proxy

HOUSE = Path(__file__).parents[2]
SCHEMATHESIS = [sys.executable, "-m", "schemathesis.cli", "--config-file", "tests/promises/schemathesis.toml", "run"]
DOCUMENT: dict[str, Any] = yaml.safe_load((HOUSE / "docs" / "openapi.yaml").read_text())

# What comes of a daemon's state or of a broken line, and not of what a generator sends: provoked below, a test each.
PROVOKED = (401, 403, 408, 409, 410, 413, 415, 429, 500, 503)

ADMIN = {"x-admin": ADMIN_KEY}


class Call(NamedTuple):
    """One operation of the document."""

    method: str
    path: str

    @property
    def said(self) -> dict[str, Any]:
        """What the document says of it."""
        return cast("dict[str, Any]", DOCUMENT["paths"][self.path][self.method.lower()])


CALLS = [Call(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item]
LISTED = {(call, int(status)) for call in CALLS for status in call.said["responses"]}


def listing(status: int) -> list[Call]:
    """The calls that list this status."""
    return [call for call in CALLS if (call, status) in LISTED]


# ---- the document itself --------------------------------------------------------------------------------------------


def test_it_is_valid_openapi_of_this_version() -> None:
    openapi_spec_validator.validate(DOCUMENT)
    assert DOCUMENT["info"]["version"] == __version__


def test_its_calls_are_the_routes_of_the_daemon() -> None:
    app = make_app(cast("Parts", SimpleNamespace(settings=Settings())))
    routes = {(r.method, r.resource.canonical) for r in app.router.routes() if r.resource is not None}
    heads = {("HEAD", call.path) for call in CALLS if call.method == "GET"}
    slashed = {(method, f"/{path}") for method, path in {*CALLS, *heads}}
    assert routes - {("*", "/{tail}")} == {*CALLS, *heads, *slashed}


def test_the_parameters_of_each_call_are_those_that_the_daemon_takes() -> None:
    taken = {Call(route.method, route.path): sorted(route.query) for route in ROUTES}
    assert {call: parameters(call) for call in CALLS} == taken


def parameters(call: Call) -> list[str]:
    """The query parameters that the document lists for a call."""
    return sorted(one["name"] for one in call.said.get("parameters", []) if one["in"] == "query")


# ---- as it is answered ----------------------------------------------------------------------------------------------


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The document, made to refuse every field of an answer that it does not list. Clients are to ignore what they do
    not know; the test is not."""
    document = copy.deepcopy(document)
    schemas = document["components"]["schemas"]
    for node, of_a_whole in _schemas(document, of_a_whole=False):
        shape = schemas[node["$ref"].rpartition("/")[2]] if node.get("$ref", "").count("/") == 3 else node
        if not of_a_whole and {"properties", "allOf"} & shape.keys() and "additionalProperties" not in shape:
            node["unevaluatedProperties"] = False
    return document


def _schemas(node: Any, *, of_a_whole: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every place in which a schema is used; whether it is a part of an allOf, which must not forbid the others."""
    if isinstance(node, list):
        for child in node:
            yield from _schemas(child, of_a_whole=of_a_whole)
    elif isinstance(node, dict):
        for key, child in node.items():
            if key in ("schema", "items"):
                yield child, False
            elif key == "properties":
                yield from ((one, False) for one in child.values())
            yield from _schemas(child, of_a_whole=key == "allOf")


CLOSED = closed(DOCUMENT)
SCHEMA = schemathesis.openapi.from_dict(CLOSED)


class Heard(NamedTuple):
    """An answer, whole."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


async def ask(nexhb: Nexhb, call: Call, headers: Mapping[str, str], body: bytes = b"", query: str = "") -> Heard:
    """This call, held against the document."""
    heard = await hear(nexhb, call, headers, body, query)
    hold_against_the_document(call, heard)
    return heard


async def hear(nexhb: Nexhb, call: Call, headers: Mapping[str, str], body: bytes = b"", query: str = "") -> Heard:
    """Any call, over a connection of its own."""
    path = call.path.format(device_id="kiosk-1") + query
    sent = {"Host": "nexhb", "Connection": "close", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    answer = await raw(nexhb, f"{call.method} {path} HTTP/1.1\r\n{head}\r\n".encode(), body)
    parsed = http.client.HTTPResponse(cast("Any", SimpleNamespace(makefile=lambda _mode: io.BytesIO(answer))))
    parsed.begin()
    return Heard(parsed.status, parsed.headers, parsed.read())


def hold_against_the_document(call: Call, heard: Heard) -> None:
    """Raise unless status, content type, headers and every field are as the document says."""
    case = SCHEMA[call.path][call.method].Case(path_parameters={"device_id": "kiosk-1"})
    response = schemathesis.Response(
        status_code=heard.status,
        headers={name: heard.headers.get_all(name, []) for name in heard.headers},
        content=heard.body,
        request=requests.Request(call.method, f"http://nexhb{call.path}").prepare(),
        elapsed=0.0,
        verify=True,
    )
    case.validate_response(
        response,
        checks=[
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_headers_conformance,
            checks.response_schema_conformance,
        ],
    )


def keys(call: Call, tokens: dict[str, str]) -> list[dict[str, str]]:
    """The headers by which each of its security schemes is met; `tokens` by the name of the scheme."""
    schemes = DOCUMENT["components"]["securitySchemes"]
    found = []
    for [name] in call.said["security"]:
        scheme = schemes[name]
        bearer = {"Authorization": f"Bearer {tokens[name]}"}
        found.append({scheme["name"]: tokens[name]} if "name" in scheme else bearer)
    return found


async def tokens_of(nexhb: Nexhb) -> dict[str, str]:
    """A good key for each security scheme; the device's is of kiosk-1."""
    conn = await nexhb.database.connect(application="test keys")
    try:
        device = await devices.add(conn, "kiosk-1", None)
        until = nexhb.clock() + timedelta(days=1)
        enrolment = await devices.issue_enrolment_key(conn, note=None, uses=100_000, expires_at=until)
    finally:
        await conn.close()
    enrolments = ("enrolmentKey", "enrolmentKeyOfTheAgent", "enrolmentKeyOfItsScanner")
    admins = ("adminKey", "adminBearer")
    return {"deviceToken": device} | dict.fromkeys(enrolments, enrolment) | dict.fromkeys(admins, ADMIN_KEY)


@pytest.fixture
async def open_house(start_daemon: StartDaemon) -> Nexhb:
    """A daemon that takes new devices, and calls as often as they come."""
    often = Ingest(device_per_minute=1_000_000, device_burst=1_000_000)
    return await start_daemon(auth=open_to_all(failures_per_minute=100_000), ingest=often)


def open_to_all(**changes: Any) -> Auth:
    """Settings under which devices may register themselves."""
    return Auth(admin_key=SecretStr(ADMIN_KEY), enrolment="open", **changes)


async def test_schemathesis_finds_nothing_that_is_not_as_it_says(
    open_house: Nexhb, now: datetime, tmp_path: Path
) -> None:
    """A thousand calls that keep to the document and that do not, with good keys, wrong ones and none. POST
    /ops/nightly and /ops/reconcile are run for real: on a database as small as this one they take 20 ms."""
    tokens = await tokens_of(open_house)
    silent = await open_house.agent("kiosk-3")
    assert (await silent.live(now - timedelta(hours=2), unity_process_running=False)).status == 200
    for call in (Call("GET", "/v1/devices/offline"), Call("GET", "/v1/devices/unity-down")):
        assert b'"device_id":"kiosk-3"' in (await ask(open_house, call, ADMIN)).body
    (tmp_path / "openapi.yaml").write_text(yaml.safe_dump(CLOSED))
    before = answered()
    environment = os.environ | {
        "DEVICE_TOKEN": tokens["deviceToken"],
        "ENROLMENT_KEY": tokens["enrolmentKey"],
        "ADMIN_KEY": tokens["adminKey"],
        "PYTHONPATH": str(HOUSE),
    }
    async with asyncio.timeout(130):
        process = await asyncio.create_subprocess_exec(
            *SCHEMATHESIS, str(tmp_path / "openapi.yaml"), "--url", open_house.url, "--no-color",
            cwd=HOUSE, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert process.returncode == 0, output.decode()[-20_000:]
    heard = {one for one, count in answered().items() if count > before.get(one, 0)}
    broken = {(call, 400) for call in CALLS if "requestBody" in call.said or not parameters(call)}
    assert {(call, status) for call, status in LISTED - broken if status not in PROVOKED} <= heard


def answered() -> dict[tuple[Call, int], float]:
    """How often which call was answered with which status, by all daemons of this process so far."""
    [family] = metrics.http_request_latency_ms.collect()
    return {
        (Call(one.labels["method"], one.labels["route"]), int(one.labels["status"])): one.value
        for one in family.samples
        if one.name.endswith("_count")
    }


async def test_what_it_says_of_any_call_is_so(nexhb: Nexhb) -> None:
    said = DOCUMENT["info"]["description"]
    health = Call("GET", "/healthz")
    for call, headers, status in (
        (Call("GET", "/v2/heartbeat"), {}, 404),
        *((Call(method, "/healthz"), {}, 405) for method in ("DELETE", "OPTIONS", "POST")),
        (health, {"Expect": "the unexpected"}, 417),
        (health, {"Content-Length": "many"}, 400),
    ):
        heard = await hear(nexhb, call, headers)
        assert f"- {status} where" in said
        assert (heard.status, heard.headers["Content-Type"]) == (status, "application/problem+json")
        assert orjson.loads(heard.body).keys() == {"type", "title", "status", "detail"}
        assert heard.headers["Allow"] == ("GET, HEAD" if status == 405 else None)


# ---- what has to be provoked ----------------------------------------------------------------------------------------


async def test_400_for_a_parameter_that_is_not_listed(nexhb: Nexhb) -> None:
    assert [(await ask(nexhb, call, ADMIN, query="?unknown=1")).status for call in CALLS] == [400] * len(CALLS)


async def test_401_a_call_is_opened_by_each_key_that_it_names_and_by_nothing_else(open_house: Nexhb) -> None:
    tokens = await tokens_of(open_house)
    wrong = dict.fromkeys(tokens, devices.new_token())
    for call in listing(401):
        assert (await ask(open_house, call, {})).status == 401
        for right, wrong_key in zip(keys(call, tokens), keys(call, wrong), strict=True):
            assert (await ask(open_house, call, wrong_key)).status == 401
            assert (await ask(open_house, call, right)).status not in (401, 403)
    for call in set(CALLS) - set(listing(401)):
        assert call.said["security"] == []
        assert (await ask(open_house, call, {})).status == 200


async def test_403_where_devices_are_added_by_the_operator(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon()
    assert [(await ask(nexhb, call, {})).status for call in listing(403)] == [403]


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (400, {}),
        (408, {"Content-Length": "9"}),
        (413, {"Content-Length": "100000000"}),  # over the largest bound there is, of a queue
        (415, {"Content-Type": "text/plain"}),
        (415, {"Content-Encoding": "gzip"}),
    ],
)
async def test_a_body_that_is_not_taken_is_refused_as_it_says(
    start_daemon: StartDaemon, status: int, headers: dict[str, str]
) -> None:
    nexhb = await start_daemon(auth=open_to_all(), server=Server(port=0, body_timeout_seconds=0.1))
    tokens = await tokens_of(nexhb)

    def broken(call: Call) -> bytes:
        return b"{" if call.path == "/v1/heartbeat" else b"[1,"

    with_a_body = [call for call in CALLS if "requestBody" in call.said]
    answers = [ask(nexhb, call, keys(call, tokens)[0] | headers, broken(call)) for call in with_a_body]
    assert [heard.status for heard in await asyncio.gather(*answers)] == [status] * 5


async def test_409_for_a_device_that_is_there_and_has_sent(open_house: Nexhb, now: datetime) -> None:
    """One that has not sent is admitted again by the key that it came with: its answer may have been lost."""
    tokens = await tokens_of(open_house)
    await (await open_house.agent("there")).send(now)
    for call in listing(409):
        assert (await ask(open_house, call, keys(call, tokens)[0], b'{"device_id":"there"}')).status == 409


async def test_410_for_a_revoked_device(open_house: Nexhb) -> None:
    tokens = await tokens_of(open_house)
    conn = await open_house.database.connect(application="test revoke")
    await devices.revoke(conn, "kiosk-1", open_house.clock())
    await conn.close()
    async with asyncio.timeout(SOON_S):
        for call in listing(410):
            while (await ask(open_house, call, keys(call, tokens)[0])).status != 410:
                pass


async def test_429_for_an_address_that_guesses(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon(auth=open_to_all(failures_per_minute=1))
    call = CALLS[0]
    while (await ask(nexhb, call, {})).status != 429:
        pass
    assert [(await ask(nexhb, call, {})).status for call in listing(401)] == [429] * len(listing(429))


async def test_500_for_a_job_that_fails(nexhb: Nexhb) -> None:
    conn = await nexhb.database.connect(application="test damage")
    await conn.execute("DROP TABLE device_last_status")
    await conn.close()
    for call in listing(500):
        assert (await ask(nexhb, call, ADMIN)).status == 500


async def test_503_while_nothing_can_be_committed(start_daemon: StartDaemon, database: Database) -> None:
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(auth=open_to_all(), url=proxy.dsn)
        tokens = await tokens_of(nexhb)
        ready, queue = Call("GET", "/readyz"), Call("POST", "/v1/heartbeats")
        assert (await ask(nexhb, queue, keys(queue, tokens)[0])).status == 200  # the daemon knows the token
        proxy.take_away()
        async with asyncio.timeout(SOON_S):
            while (await ask(nexhb, ready, {})).status != 503:
                pass
        for call in listing(503):
            key = {} if call == ready else keys(call, tokens)[0]
            assert (await ask(nexhb, call, key)).status == 503
