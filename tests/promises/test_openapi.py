"""docs/openapi.yaml is correct: its routes are the daemon's, and every response is as documented, whatever is sent."""

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

from nexhb import __version__, metrics
from nexhb.config import AuthSettings, IngestSettings, NotifySettings, ServerSettings, Settings
from nexhb.devices import enrolment as device_enrolment
from nexhb.devices import registry, sites
from nexhb.devices import tokens as device_tokens
from nexhb.devices.sites import Site
from nexhb.http.app import ROUTES, make_app
from nexhb.http.device_api.context import DeviceApi
from nexhb.http.operator_api.context import OperatorApi
from nexhb.postgres.connections import Database
from tests.conftest import ADMIN_KEY, HANGS_AFTER_S, SOON_S, Nexhb, StartDaemon
from tests.proxy import Proxy
from tests.support.hostile import raw
from tests.support.receiver import Receiver

HOUSE = Path(__file__).parents[2]
SCHEMATHESIS = [sys.executable, "-m", "schemathesis.cli", "--config-file", "tests/promises/schemathesis.toml", "run"]
DOCUMENT: dict[str, Any] = yaml.safe_load((HOUSE / "docs" / "openapi.yaml").read_text())

# Statuses that depend on a daemon's state or a broken connection, not on what a generator sends. Each has a test below.
PROVOKED = (401, 403, 408, 409, 410, 413, 415, 429, 500, 503)

ADMIN = {"x-admin": ADMIN_KEY}
PLACEHOLDERS = {"device_id": "kiosk-1", "site": "store-1", "incident_id": "1", "silence_id": "1", "route": "on-call"}


class Call(NamedTuple):
    """One operation of the document."""

    method: str
    path: str

    @property
    def said(self) -> dict[str, Any]:
        """Return what the document says of the operation."""
        return cast("dict[str, Any]", DOCUMENT["paths"][self.path][self.method.lower()])


CALLS = [Call(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item]
STREAM = Call("GET", "/v1/stream")  # its 200 response does not end; tests/integration/test_stream.py reads it
LISTED = {(call, int(status)) for call in CALLS for status in call.said["responses"]}


def listing(status: int) -> list[Call]:
    """Return the calls that list this status."""
    return [call for call in CALLS if (call, status) in LISTED]


# ---- the document itself --------------------------------------------------------------------------------------------


def test_the_description_is_valid_openapi_and_has_the_version_of_nexhb() -> None:
    openapi_spec_validator.validate(DOCUMENT)
    assert DOCUMENT["info"]["version"] == __version__


def test_the_paths_are_the_routes_of_the_daemon() -> None:
    app = make_app(cast("DeviceApi", SimpleNamespace(settings=Settings())), cast("OperatorApi", SimpleNamespace()))
    routes = {(r.method, r.resource.canonical) for r in app.router.routes() if r.resource is not None}
    heads = {("HEAD", call.path) for call in CALLS if call.method == "GET"}
    slashed = {(method, f"/{path}") for method, path in {*CALLS, *heads}}
    assert routes - {("*", "/{tail}")} == {*CALLS, *heads, *slashed}


def test_the_parameters_of_each_call_are_those_that_the_daemon_accepts() -> None:
    taken = {Call(route.method, route.path): sorted(route.query) for route in ROUTES}
    assert {call: parameters(call) for call in CALLS} == taken


def parameters(call: Call) -> list[str]:
    """Return the query parameters that the document lists for a call."""
    return sorted(one["name"] for one in call.said.get("parameters", []) if one["in"] == "query")


# ---- its responses --------------------------------------------------------------------------------------------------


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document, changed to reject every field of a response that it does not list. Clients must ignore
    unknown fields; the test must not."""
    document = copy.deepcopy(document)
    schemas = document["components"]["schemas"]
    for node, of_a_whole in _schemas(document, of_a_whole=False):
        shape = schemas[node["$ref"].rpartition("/")[2]] if node.get("$ref", "").count("/") == 3 else node
        if not of_a_whole and {"properties", "allOf"} & shape.keys() and "additionalProperties" not in shape:
            node["unevaluatedProperties"] = False
    return document


def _schemas(node: Any, *, of_a_whole: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield each use of a schema, and whether it is a part of an allOf, which must not forbid fields of other parts."""
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
    """A complete response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


async def ask(nexhb: Nexhb, call: Call, headers: Mapping[str, str], body: bytes = b"", query: str = "") -> Heard:
    """Make this call, and check the response against the document."""
    heard = await hear(nexhb, call, headers, body, query)
    hold_against_the_document(call, heard)
    return heard


async def hear(nexhb: Nexhb, call: Call, headers: Mapping[str, str], body: bytes = b"", query: str = "") -> Heard:
    """Make any call, over a connection of its own."""
    path = call.path.format(**PLACEHOLDERS) + query
    sent = {"Host": "nexhb", "Connection": "close", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    answer = await raw(nexhb, f"{call.method} {path} HTTP/1.1\r\n{head}\r\n".encode(), body)
    parsed = http.client.HTTPResponse(cast("Any", SimpleNamespace(makefile=lambda _mode: io.BytesIO(answer))))
    parsed.begin()
    return Heard(parsed.status, parsed.headers, parsed.read())


def hold_against_the_document(call: Call, heard: Heard) -> None:
    """Raise unless status, content type, headers and every field are as documented."""
    case = SCHEMA[call.path][call.method].Case(path_parameters=PLACEHOLDERS)
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
    """Return the headers that satisfy each of the call's security schemes; `tokens` has a token for each scheme."""
    schemes = DOCUMENT["components"]["securitySchemes"]
    found = []
    for [name] in call.said["security"]:
        scheme = schemes[name]
        bearer = {"Authorization": f"Bearer {tokens[name]}"}
        found.append({scheme["name"]: tokens[name]} if "name" in scheme else bearer)
    return found


async def tokens_of(nexhb: Nexhb) -> dict[str, str]:
    """Return a valid key for each security scheme; the device's token is that of kiosk-1."""
    conn = await nexhb.database.connect(application="test keys")
    try:
        device = await registry.add(conn, "kiosk-1", None)
        for site in ("store-1", "store-2"):
            await sites.put(conn, Site(site))
        await registry.change(
            conn, "kiosk-1", {"site": "store-1", "tags": ["outdoor"]}
        )  # so that no call removes store-1
        until = nexhb.clock() + timedelta(days=1)
        enrolment = await device_enrolment.issue_enrolment_key(conn, note=None, uses=100_000, expires_at=until)
    finally:
        await conn.close()
    enrolments = ("enrolmentKey", "enrolmentKeyOfTheAgent", "enrolmentKeyOfItsScanner")
    admins = ("adminKey", "adminBearer")
    return {"deviceToken": device} | dict.fromkeys(enrolments, enrolment) | dict.fromkeys(admins, ADMIN_KEY)


@pytest.fixture
async def open_house(start_daemon: StartDaemon) -> Nexhb:
    """Return a daemon that accepts new devices, and has no rate limit in effect."""
    often = IngestSettings(device_per_minute=1_000_000, device_burst=1_000_000)
    nobody_listens = NotifySettings(routes=[Receiver("http://127.0.0.1:9").route("on-call")])
    return await start_daemon(auth=open_to_all(failures_per_minute=100_000), ingest=often, notify=nobody_listens)


def open_to_all(**changes: Any) -> AuthSettings:
    """Return settings under which devices may register themselves."""
    return AuthSettings(admin_key=SecretStr(ADMIN_KEY), enrolment="open", **changes)


async def test_schemathesis_finds_no_difference_between_description_and_daemon(
    open_house: Nexhb, now: datetime, tmp_path: Path
) -> None:
    """Schemathesis makes a thousand calls that follow the document or violate it, with valid keys, invalid ones and
    none. POST /ops/nightly and /ops/reconcile run for real: on a database as small as this one, they take 20 ms."""
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
    async with asyncio.timeout(HANGS_AFTER_S - 20):
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
    broken = {(STREAM, 200), (STREAM, 400), (STREAM, 404)}
    broken |= {(call, 400) for call in CALLS if "requestBody" in call.said or not parameters(call)}
    assert {(call, status) for call, status in LISTED - broken if status not in PROVOKED} <= heard


def answered() -> dict[tuple[Call, int], float]:
    """Return the number of responses by call and status, of all daemons of this process so far."""
    [family] = metrics.http_request_latency_ms.collect()
    return {
        (Call(one.labels["method"], one.labels["route"]), int(one.labels["status"])): one.value
        for one in family.samples
        if one.name.endswith("_count")
    }


async def test_statements_about_every_call_are_true(nexhb: Nexhb) -> None:
    said = DOCUMENT["info"]["description"]
    health = Call("GET", "/healthz")
    for call, headers, status in (
        (Call("GET", "/v2/heartbeat"), {}, 404),
        *((Call(method, "/healthz"), {}, 405) for method in ("DELETE", "OPTIONS", "POST")),
        (health, {"Expect": "the unexpected"}, 417),
        (health, {"Content-Length": "many"}, 400),
    ):
        heard = await hear(nexhb, call, headers)
        assert f"- {status} if" in said
        assert (heard.status, heard.headers["Content-Type"]) == (status, "application/problem+json")
        assert orjson.loads(heard.body).keys() == {"type", "title", "status", "detail"}
        assert heard.headers["Allow"] == ("GET, HEAD" if status == 405 else None)


# ---- statuses that have to be provoked ------------------------------------------------------------------------------


async def test_400_for_a_parameter_that_is_not_listed(nexhb: Nexhb) -> None:
    assert [(await ask(nexhb, call, ADMIN, query="?unknown=1")).status for call in CALLS] == [400] * len(CALLS)


async def test_each_call_accepts_the_keys_that_it_names_and_responds_with_401_to_others(open_house: Nexhb) -> None:
    tokens = await tokens_of(open_house)
    wrong = dict.fromkeys(tokens, device_tokens.new_token())
    for call in listing(401):
        assert (await ask(open_house, call, {})).status == 401
        for right, wrong_key in zip(keys(call, tokens), keys(call, wrong), strict=True):
            assert (await ask(open_house, call, wrong_key)).status == 401
            query = "?kind=none" if call == STREAM else ""
            assert (await ask(open_house, call, right, query=query)).status not in (401, 403)
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
        (413, {"Content-Length": "100000000"}),  # above the largest limit, the limit of a queue
        (415, {"Content-Type": "text/plain"}),
        (415, {"Content-Encoding": "gzip"}),
    ],
)
async def test_an_invalid_body_receives_the_documented_response(
    start_daemon: StartDaemon, status: int, headers: dict[str, str]
) -> None:
    nexhb = await start_daemon(auth=open_to_all(), server=ServerSettings(port=0, body_timeout_seconds=0.1))
    tokens = await tokens_of(nexhb)

    def broken(call: Call) -> bytes:
        return b"[1," if call.path == "/v1/heartbeats" else b"{"

    with_a_body = [call for call in CALLS if "requestBody" in call.said]
    answers = [ask(nexhb, call, keys(call, tokens)[0] | headers, broken(call)) for call in with_a_body]
    assert [heard.status for heard in await asyncio.gather(*answers)] == [status] * len(with_a_body)


async def test_409_for_a_device_that_is_there_and_has_sent(open_house: Nexhb, now: datetime) -> None:
    """A device that has not sent may register again with the same key, since its first response may be lost."""
    tokens = await tokens_of(open_house)
    await (await open_house.agent("there")).send(now)
    for call in listing(409):
        assert (await ask(open_house, call, keys(call, tokens)[0], b'{"device_id":"there"}')).status == 409


async def test_410_for_a_revoked_device(open_house: Nexhb) -> None:
    tokens = await tokens_of(open_house)
    conn = await open_house.database.connect(application="test revoke")
    await registry.revoke(conn, "kiosk-1", open_house.clock())
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
        assert (await ask(nexhb, queue, keys(queue, tokens)[0])).status == 200  # the daemon now knows the token
        proxy.make_unreachable()
        async with asyncio.timeout(SOON_S):
            while (await ask(nexhb, ready, {})).status != 503:
                pass
        for call in listing(503):
            key = {} if call == ready else keys(call, tokens)[0]
            body = b'{"scope":"fleet","hours":"24/7","reason":"x"}' if call == Call("POST", "/v1/silences") else b""
            assert (await ask(nexhb, call, key, body)).status == 503
