"""/metrics has the names that dashboards use, new names follow the rules, and no label contains a device."""

from __future__ import annotations

import re
from datetime import datetime

import orjson
import pytest

from nexhb.devices import tokens
from tests.conftest import ADMIN_KEY, Nexhb, example
from tests.support.scrape import Scrape, scrape

# The names that dashboards use, with their types in Prometheus.
SEED = {
    "heartbeats_ingested_total": "counter",
    "hb_writes_total": "counter",
    "hb_dedupe_total": "counter",
    "last_status_upserts_total": "counter",
    "partitions_created_total": "counter",
    "partition_create_failures_total": "counter",
    "partitions_archived_total": "counter",
    "partitions_dropped_total": "counter",
    "archive_failures_total": "counter",
    "reconciliation_rows_updated_total": "counter",
    "reconciliation_runs_total": "counter",
    "http_request_latency_ms": "histogram",
    "hb_write_latency_ms": "histogram",
    "last_status_read_latency_ms": "histogram",
}
LABELS = {
    "http_request_latency_ms": {"route", "method", "status"},
    "last_status_read_latency_ms": {"query"},
    "reconciliation_runs_total": {"status"},
}
OF_THE_LIBRARY = ("python_", "process_")
# Prometheus asks for base units in the plural; a plain count or a state needs no unit.
UNITS_THAT_ARE_NOT_BASE = (
    "_ms",
    "_millis",
    "_milliseconds",
    "_minutes",
    "_hours",
    "_days",
    "_kb",
    "_mb",
    "_kib",
    "_mib",
)


@pytest.fixture
async def used(nexhb: Nexhb, now: datetime) -> tuple[Scrape, Scrape, list[str]]:
    """Return /metrics before and after a daemon was used in every way, and the secrets and names involved."""
    agent = await nexhb.agent("kiosk-of-the-metrics-test")
    before = await scrape(nexhb)
    assert (await agent.send(now)).status == 200
    assert (await agent.send(now)).body["deduplicated"]
    other = example(now, device_id="another-kiosk", alias="an-alias", network={"ip": "x"})
    assert (await agent.post(orjson.dumps(other))).status == 200
    assert (await agent.post(b"{")).status == 400
    assert (await agent.post(b"[]", "/v1/heartbeats")).status == 200
    token, agent.token = agent.token, tokens.new_token()
    assert (await agent.send(now)).status == 401
    for path in ("", "/offline", "/unity-down", f"/{agent.device_id}", f"/{agent.device_id}/heartbeats"):
        await nexhb.get(f"/v1/devices{path}")
    await nexhb.get("/v1/fleet")
    await nexhb.get("/ops/jobs")
    for job in ("nightly", "reconcile"):
        async with nexhb.http.post(f"{nexhb.url}/ops/{job}", headers={"x-admin": ADMIN_KEY}) as response:
            assert response.status == 200
    await nexhb.get("/v1/devices/no-such-kiosk", 404)
    await nexhb.get(f"/nothing/here/{agent.device_id}", 404)
    names = [agent.device_id, "another-kiosk", "no-such-kiosk", "an-alias", token, agent.token, ADMIN_KEY, "Store-42"]
    return before, await scrape(nexhb), names


async def test_the_metrics_of_the_old_system_exist_and_count(used: tuple[Scrape, Scrape, list[str]]) -> None:
    before, after, _ = used

    def gained(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    for name, kind in SEED.items():
        assert after.types[name] == kind
        assert after.helps[name]
        assert after.of(f"{name}_count" if kind == "histogram" else name), f"{name} has no sample"
    assert gained("heartbeats_ingested_total") == 4
    assert gained("hb_writes_total") == 1
    assert gained("hb_dedupe_total") == 2
    assert gained("last_status_upserts_total") == 3  # a duplicate also shows that the device is alive
    assert before.value("partitions_created_total") >= 22  # one week back and two weeks ahead, created at the start
    assert gained("partition_create_failures_total") == 0
    assert gained("reconciliation_runs_total", status="completed") == 1
    assert gained("nexhb_job_runs_total", job="nightly", status="completed") == 1
    assert gained("hb_write_latency_ms_count") >= 1
    route = {"route": "/v1/heartbeat", "method": "POST"}
    assert gained("http_request_latency_ms_count", **route, status="200") == 3
    assert gained("http_request_latency_ms_count", **route, status="400") == 1
    assert gained("http_request_latency_ms_count", **route, status="401") == 1
    assert gained("http_request_latency_ms_count", route="/v1/devices/{device_id}", method="GET", status="404") == 1
    for query in ("fleet", "devices", "device", "offline", "unity_down", "history"):
        assert gained("last_status_read_latency_ms_count", query=query) >= 1


async def test_a_histogram_is_cumulative_and_ends_with_its_count(used: tuple[Scrape, Scrape, list[str]]) -> None:
    _, after, _ = used
    labels = {"route": "/v1/heartbeat", "method": "POST", "status": "200"}
    buckets = after.of("http_request_latency_ms_bucket", **labels)
    values = [sample.value for sample in sorted(buckets, key=lambda sample: float(sample.labels["le"]))]
    assert values == sorted(values)
    assert values[-1] == after.value("http_request_latency_ms_count", **labels) > 0
    assert after.value("http_request_latency_ms_sum", **labels) > 0


async def test_every_new_name_has_the_prefix_nexhb_and_a_base_unit(used: tuple[Scrape, Scrape, list[str]]) -> None:
    _, after, _ = used
    ours = {name for name in after.types if not name.startswith(OF_THE_LIBRARY)}
    for name in ours - SEED.keys():
        assert name.startswith("nexhb_"), name
        assert not name.removesuffix("_total").endswith(UNITS_THAT_ARE_NOT_BASE), name
        assert name.endswith("_total") == (after.types[name] == "counter"), name
        assert after.helps[name]
    assert len(ours) > len(SEED)


async def test_labels_are_those_of_the_old_system_and_none_identifies_a_device(
    used: tuple[Scrape, Scrape, list[str]],
) -> None:
    _, after, names = used
    for sample in after.samples:
        name = re.sub(r"_(bucket|count|sum)$", "", sample.name)
        if name in SEED:
            assert sample.labels.keys() - {"le"} == LABELS.get(name, set()), sample
        assert not sample.labels.keys() & {"device", "device_id", "device_no", "alias", "ssid", "ip", "token"}, sample
        for value in sample.labels.values():
            assert not any(one in value for one in names), sample


async def test_a_hundred_more_devices_add_no_time_series(nexhb: Nexhb, now: datetime) -> None:
    await (await nexhb.agent()).send(now)
    await scrape(nexhb)  # from its second request on, /metrics includes itself
    before = await scrape(nexhb)
    for _ in range(100):
        agent = await nexhb.agent()
        assert (await agent.send(now)).status == 200
    series = {(s.name, *sorted(s.labels.items())) for s in (await scrape(nexhb)).samples}
    assert series == {(s.name, *sorted(s.labels.items())) for s in before.samples}
