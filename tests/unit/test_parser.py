"""Parsing the bodies of devices: docs/wire.md line by line, then arbitrary bytes."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import example as case
from hypothesis import strategies as st

from nexhb.heartbeat import (
    ALL_SECTIONS,
    APPS,
    BATTERY,
    BUCKET_EPOCH,
    MEMORY,
    NETWORK,
    SYSTEM,
    Column,
    DeviceFacts,
    FieldError,
    Heartbeat,
    Label,
    Refused,
    bucket_of,
)
from nexhb.ingest import body_schema, parser
from nexhb.ingest.parser import HeartbeatRules, ParsedQueue
from nexhb.postgres.codecs import pack_ip
from tests.conftest import example, timestamp

PACKAGE = "io.unitynodes.unityapp"
RULES = HeartbeatRules(PACKAGE, 10, timedelta(days=7), timedelta(minutes=5))
RECEIVED = datetime(2026, 11, 24, 2, 0, 30, 500_000, tzinfo=UTC)
MADE = datetime(2026, 11, 24, 2, 0, 0, 123_456, tzinfo=UTC)


def parse(body: bytes | dict[str, Any], rules: HeartbeatRules = RULES, received_at: datetime = RECEIVED) -> Heartbeat:
    """Return a heartbeat of device 7. A dict is encoded as JSON, with the timestamp MADE unless it has another."""
    if isinstance(body, dict):
        body = orjson.dumps({"timestamp_utc": timestamp(MADE)} | body)
    return parser.parse(body, device_no=7, device_id="kiosk-7", received_at=received_at, rules=rules)


def refusal(body: bytes | dict[str, Any]) -> Refused:
    """Return the error with which the body is refused."""
    with pytest.raises(Refused) as caught:
        parse(body)
    return caught.value


def test_every_field_of_the_agents_example_is_read() -> None:
    heartbeat = parse(orjson.dumps(example(MADE)))
    assert (heartbeat.device_no, heartbeat.device_id, heartbeat.received_at) == (7, "kiosk-7", RECEIVED)
    assert (heartbeat.ts, heartbeat.clock_wrong) == (MADE, False)
    assert heartbeat.label == Label("1.0.9", "2.1.0", "wifi", "Store-42")
    assert (heartbeat.battery_pct, heartbeat.plugged, heartbeat.temp_c) == (87, True, 31.5)
    assert (heartbeat.uptime_s, heartbeat.ram_used_mb) == (12_345_678, 1837)
    assert (heartbeat.ip, heartbeat.signal_dbm) == (pack_ip("192.168.1.50"), None)
    assert heartbeat.unity_running is True
    assert heartbeat.facts == DeviceFacts(
        "Store 42 - kiosk 3", "13", 33, "2025-09-05", "TP1A.220624.014", "SM-T500", "samsung"
    )
    assert heartbeat.claimed_device_id == "0b9c6a52-7c40-4a5e-9c1d-3f3c1c0d7e11"
    assert (heartbeat.queue_depth, heartbeat.dropped) == (0, ())


def test_a_body_with_only_a_timestamp_has_no_other_value() -> None:
    heartbeat = parse({})
    assert heartbeat.ts == MADE
    assert heartbeat.label == Label("", "", "", "", 0)
    assert heartbeat.facts == DeviceFacts(None, None, None, None, None, None, None)
    values = (
        heartbeat.battery_pct, heartbeat.plugged, heartbeat.temp_c, heartbeat.ip, heartbeat.signal_dbm,
        heartbeat.uptime_s, heartbeat.ram_used_mb, heartbeat.unity_running, heartbeat.claimed_device_id,
        heartbeat.queue_depth,
    )  # fmt: skip
    assert values == (None,) * 10


# ---- the state of Unity -----------------------------------------------------------------------------------------

INSTALLED: dict[str, Any] = {PACKAGE: {"installed": True, "version_name": "2.1.0"}}
NOT_INSTALLED: dict[str, Any] = {PACKAGE: {"installed": False, "version_name": "2.1.0"}}
ABSENT = object()


@pytest.mark.parametrize(
    ("apps", "process", "recent", "running", "version"),
    [
        # not installed → null, whatever the other fields state
        (NOT_INSTALLED, True, 0, None, ""),
        (NOT_INSTALLED, False, 0, None, ""),
        (NOT_INSTALLED, ABSENT, 0, None, ""),
        ({}, True, 0, None, ""),
        ({"org.zwanoo.android.speedtest": {"installed": True}}, True, 0, None, ""),
        # if the state of the process is given, it counts
        (INSTALLED, True, ABSENT, True, "2.1.0"),
        (INSTALLED, True, 86_400, True, "2.1.0"),
        (INSTALLED, True, -1, True, "2.1.0"),
        (INSTALLED, False, ABSENT, False, "2.1.0"),
        (INSTALLED, False, 0, False, "2.1.0"),
        # the process is null or absent: the time since Unity was in the foreground counts
        (INSTALLED, ABSENT, 0, True, "2.1.0"),
        (INSTALLED, None, 0, True, "2.1.0"),
        (INSTALLED, ABSENT, 599, True, "2.1.0"),
        (INSTALLED, None, 599, True, "2.1.0"),
        (INSTALLED, ABSENT, 599.6, False, "2.1.0"),
        (INSTALLED, ABSENT, -0.4, True, "2.1.0"),
        (INSTALLED, ABSENT, 600, False, "2.1.0"),
        (INSTALLED, None, 600, False, "2.1.0"),
        (INSTALLED, ABSENT, 86_400, False, "2.1.0"),
        # if neither the process nor that time is given, the state of Unity is unknown
        (INSTALLED, ABSENT, -1, None, "2.1.0"),
        (INSTALLED, None, -1, None, "2.1.0"),
        (INSTALLED, None, None, None, "2.1.0"),
        (INSTALLED, ABSENT, ABSENT, None, "2.1.0"),
        # an agent that omits app_versions may still state the process
        (ABSENT, True, ABSENT, True, ""),
        (ABSENT, False, ABSENT, False, ""),
        (ABSENT, ABSENT, 599, True, ""),
        (None, ABSENT, ABSENT, None, ""),
        # Gson omits nulls: installed, but without a version
        ({PACKAGE: {"installed": True}}, True, ABSENT, True, ""),
        ({PACKAGE: {}}, True, ABSENT, True, ""),
    ],
)
def test_the_state_of_unity_follows_wire_md(
    apps: object, process: object, recent: object, running: bool | None, version: str
) -> None:
    fields = {"app_versions": apps, "unity_process_running": process, "monitored_foreground_recent_s": recent}
    heartbeat = parse({key: value for key, value in fields.items() if value is not ABSENT})
    assert (heartbeat.unity_running, heartbeat.label.unity_pkg_version) == (running, version)


def test_the_unity_package_is_a_setting() -> None:
    rules = RULES._replace(unity_package="com.example.app")
    apps = {"com.example.app": {"installed": True, "version_name": "7"}, PACKAGE: {"installed": False}}
    heartbeat = parse({"app_versions": apps, "unity_process_running": True}, rules)
    assert (heartbeat.unity_running, heartbeat.label.unity_pkg_version) == (True, "7")


def test_an_error_in_the_unity_entry_is_named_by_its_full_path() -> None:
    caught = refusal({"app_versions": {PACKAGE: {"installed": True, "version_name": 210}}})
    assert [error.path for error in caught.errors] == [f"app_versions.{PACKAGE}.version_name"]
    assert parse({"app_versions": {"another.app": {"installed": "perhaps"}}}).unity_running is None


# ---- numbers ----------------------------------------------------------------------------------------------------

NUMBERS = [
    ("battery", "pct", "battery_pct", b"87.0", 87),
    ("battery", "pct", "battery_pct", b"87", 87),
    ("battery", "pct", "battery_pct", b"0.0", 0),
    ("battery", "pct", "battery_pct", b"100.0", 100),
    ("battery", "pct", "battery_pct", b"8.7E1", 87),
    ("battery", "pct", "battery_pct", b"87.4", 87),
    ("battery", "pct", "battery_pct", b"87.5", 88),
    ("battery", "pct", "battery_pct", b"-0.4", 0),
    ("battery", "pct", "battery_pct", b"100.4", 100),
    ("battery", "pct", "battery_pct", b"null", None),
    ("battery", "temperature_c", "temp_c", b"31.5", 31.5),
    ("battery", "temperature_c", "temp_c", b"-12", -12.0),
    ("system", "uptime_seconds", "uptime_s", b"1.2345678E7", 12_345_678),
    ("system", "uptime_seconds", "uptime_s", b"12345678", 12_345_678),
    ("system", "uptime_seconds", "uptime_s", b"2.147483647E9", 2**31 - 1),
    ("network", "signal_dbm", "signal_dbm", b"-67.0", -67),
]


@pytest.mark.parametrize(("section", "key", "attribute", "text", "value"), NUMBERS)
def test_an_integral_double_is_an_integer_and_a_fraction_is_rounded(
    section: str, key: str, attribute: str, text: bytes, value: float | None
) -> None:
    body = b'{"timestamp_utc":"%s","%s":{"%s":%s}}' % (timestamp(MADE).encode(), section.encode(), key.encode(), text)
    parsed = getattr(parse(body), attribute)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"battery": {"pct": 101}}, "battery.pct"),
        ({"battery": {"pct": 100.6}}, "battery.pct"),
        ({"battery": {"pct": -1}}, "battery.pct"),
        ({"battery": {"temperature_c": 1e39}}, "battery.temperature_c"),
        ({"system": {"uptime_seconds": 2**31}}, "system.uptime_seconds"),
        ({"system": {"uptime_seconds": -1}}, "system.uptime_seconds"),
        ({"system": {"sdk_int": 2**31}}, "system.sdk_int"),
        ({"memory": {"total_ram_mb": 2**31}}, "memory.total_ram_mb"),
        ({"memory": {"avail_ram_mb": -5}}, "memory.avail_ram_mb"),
        ({"signal_dbm": 40_000}, "signal_dbm"),
        ({"network": {"signal_dbm": -40_000}}, "signal_dbm"),
        ({"monitored_foreground_recent_s": 1e300}, "monitored_foreground_recent_s"),
    ],
)
def test_a_number_that_does_not_fit_its_column_is_refused_by_name(body: dict[str, Any], path: str) -> None:
    caught = refusal(body)
    assert (caught.status, [error.path for error in caught.errors]) == (422, [path])
    assert caught.errors[0].message


@pytest.mark.parametrize(("path", "column"), [(p, c) for p, c in body_schema.STORED_IN.items() if c.type != "text"])
def test_a_number_is_accepted_from_the_lowest_to_the_highest_value_of_its_column(path: str, column: Column) -> None:
    """Integers may have a fraction that rounds into the range, halves to even; the limits of a real are excluded."""
    section, _, key = path.rpartition(".")
    low, high = column.limits
    inside, outside = [low, high], [low - 1, high + 1, 1e300]
    if column.type == "real":
        inside, outside = [low * 0.999, high * 0.999], [low, high, 1e300]
    for value in inside:
        parse({section: {key: value}} if section else {key: value})
    for value in outside:
        caught = refusal({section: {key: value}} if section else {key: value})
        assert [error.path for error in caught.errors] == [path]


def test_signal_is_read_from_the_top_level_or_else_from_network() -> None:
    assert parse({"signal_dbm": -70}).signal_dbm == -70
    assert parse({"network": {"signal_dbm": -71}}).signal_dbm == -71
    assert parse({"signal_dbm": -70, "network": {"signal_dbm": -71}}).signal_dbm == -70


def test_used_ram_needs_both_figures_and_is_never_negative() -> None:
    assert parse({"memory": {"total_ram_mb": 2848.0, "avail_ram_mb": 1011.0}}).ram_used_mb == 1837
    assert parse({"memory": {"total_ram_mb": 2848.0}}).ram_used_mb is None
    assert parse({"memory": {"avail_ram_mb": 1011.0}}).ram_used_mb is None
    assert parse({"memory": {"total_ram_mb": 1000, "avail_ram_mb": 1011}}).ram_used_mb == 0


# ---- texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "max_length"),
    [
        ("alias", 200), ("app_version", 50), ("network.transport", 32), ("network.ssid", 100),
        ("system.android_version", 50), ("system.patch_level", 50), ("system.build_id", 100), ("system.model", 100),
        ("system.manufacturer", 100),
    ],
)  # fmt: skip
def test_a_text_is_limited_in_length_and_must_not_contain_nul(path: str, max_length: int) -> None:
    def body(text: str) -> dict[str, Any]:
        section, _, key = path.rpartition(".")
        return {section: {key: text}} if section else {key: text}

    parse(body("ü" * max_length))
    for text in ("x" * (max_length + 1), "a\0b"):
        caught = refusal(body(text))
        assert (caught.status, [error.path for error in caught.errors]) == (422, [path])


SECTIONS = {
    "battery": BATTERY, "network": NETWORK, "memory": MEMORY, "system": SYSTEM,
    "app_versions": APPS,
}  # fmt: skip


@pytest.mark.parametrize("sections", [0, ALL_SECTIONS, *range(1, ALL_SECTIONS, 3)])
@pytest.mark.parametrize("absent", ["left out", "null"])
def test_the_sections_that_are_present_are_recorded_even_if_they_are_empty(sections: int, absent: str) -> None:
    """`"battery": {}` states that the battery's values are unknown; a body without "battery" states nothing about
    them."""
    body: dict[str, Any] = {name: {} for name, bit in SECTIONS.items() if sections & bit}
    if absent == "null":
        body |= {name: None for name, bit in SECTIONS.items() if not sections & bit}
    assert parse(body).label.sections == sections


def test_an_empty_text_is_null() -> None:
    heartbeat = parse({"alias": "", "network": {"ssid": "", "transport": "", "ip": ""}, "system": {"model": ""}})
    assert (heartbeat.facts.alias, heartbeat.facts.model) == (None, None)
    assert (heartbeat.label, heartbeat.ip, heartbeat.dropped) == (
        Label("", "", "", "", NETWORK | SYSTEM),
        None,
        (),
    )


def test_a_device_id_is_recorded_only_if_it_differs_from_the_tokens() -> None:
    assert parse({"device_id": "kiosk-7"}).claimed_device_id is None
    assert parse({"device_id": None}).claimed_device_id is None
    assert parse({"device_id": "kiosk-8"}).claimed_device_id == "kiosk-8"
    assert parse({"device_id": "x" * 5000}).claimed_device_id == "x" * 100
    assert parse({"device_id": {"a": 1}}).device_id == "kiosk-7"


def test_an_invalid_queue_depth_is_ignored() -> None:
    assert parse({"queue_depth": 17.0}).queue_depth == 17
    for odd in (-1, "many", [1], 1e300, None):
        assert parse({"queue_depth": odd}).queue_depth is None


def test_every_bad_field_is_named() -> None:
    caught = refusal({"battery": {"pct": 200}, "alias": "\0", "signal_dbm": 40_000})
    assert sorted(error.path for error in caught.errors) == ["alias", "battery.pct", "signal_dbm"]
    assert all(part in str(caught) for part in ("alias", "battery.pct", "signal_dbm"))


@pytest.mark.parametrize("field", ["brand_new", "device_id", "queue_depth", "app_versions", "self_heal_hints", "alias"])
def test_a_body_nested_too_deeply_is_refused(field: str) -> None:
    deep = b'{"timestamp_utc":"%s","%s":%s' % (timestamp(MADE).encode(), field.encode(), b'{"a":[' * 20_000)
    caught = refusal(deep)
    assert caught.status in (400, 422)
    assert caught.errors[0].message
    assert len(str(caught)) < 300


# ---- times ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "made_at"),
    [
        ("2026-11-24T02:00:00Z", datetime(2026, 11, 24, 2, tzinfo=UTC)),
        ("2026-11-24T02:00:00.123Z", datetime(2026, 11, 24, 2, 0, 0, 123_000, tzinfo=UTC)),
        ("2026-11-24T02:00:00.123456Z", datetime(2026, 11, 24, 2, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-11-24T02:00:00.123456000Z", datetime(2026, 11, 24, 2, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-11-24T02:00:00.123456789Z", datetime(2026, 11, 24, 2, 0, 0, 123_457, tzinfo=UTC)),
        ("2026-11-24T04:00:00.123+02:00", datetime(2026, 11, 24, 2, 0, 0, 123_000, tzinfo=UTC)),
        ("2026-11-23T20:30:00-05:30", datetime(2026, 11, 24, 2, tzinfo=UTC)),
        ("2026-11-24T00:15:00+00:15", datetime(2026, 11, 24, tzinfo=UTC)),
    ],
)
def test_a_time_may_have_up_to_nine_decimals_and_is_converted_to_utc(text: str, made_at: datetime) -> None:
    heartbeat = parse({"timestamp_utc": text})
    assert (heartbeat.ts, heartbeat.clock_wrong) == (made_at, False)
    assert heartbeat.ts.tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-24T02:00:00",
        "2026-11-24",
        "2026-02-30T00:00:00Z",
        "2026-11-24T25:00:00Z",
        "yesterday",
        "",
        1_795_485_600,
    ],
)
def test_an_invalid_time_is_refused_by_name(text: object) -> None:
    caught = refusal({"timestamp_utc": text})
    assert (caught.status, [error.path for error in caught.errors]) == (422, ["timestamp_utc"])


def test_a_missing_time_is_reported_as_required() -> None:
    assert refusal(b"{}").errors == [FieldError("timestamp_utc", "is required")]


MICROSECOND = timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("made_at", "accepted"),
    [
        (RECEIVED - RULES.accept_past, True),
        (RECEIVED - RULES.accept_past - MICROSECOND, False),
        (RECEIVED + RULES.accept_future, True),
        (RECEIVED + RULES.accept_future + MICROSECOND, False),
        (datetime(1970, 1, 1, tzinfo=UTC), False),
        (datetime(9999, 12, 31, tzinfo=UTC), False),
    ],
)
def test_outside_the_window_the_time_of_receipt_is_used_and_the_clock_is_marked_wrong(
    made_at: datetime, accepted: bool
) -> None:
    heartbeat = parse({"timestamp_utc": f"{made_at:%Y-%m-%dT%H:%M:%S.%f}Z"})
    assert heartbeat.clock_wrong is not accepted
    assert heartbeat.ts == (made_at if accepted else RECEIVED)
    assert heartbeat.bucket == bucket_of(heartbeat.ts, 10)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00"])
def test_a_time_that_utc_cannot_represent_is_a_wrong_clock(text: str) -> None:
    heartbeat = parse({"timestamp_utc": text})
    assert (heartbeat.ts, heartbeat.clock_wrong) == (RECEIVED, True)


EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("after_epoch", "bucket_seconds", "bucket"),
    [
        (timedelta(0), 10, 0),
        (timedelta(seconds=9, microseconds=999_999), 10, 0),
        (timedelta(seconds=10), 10, 10),
        (timedelta(seconds=19, microseconds=999_999), 10, 10),
        (-MICROSECOND, 10, -10),
        (timedelta(seconds=59, microseconds=999_999), 60, 0),
        (timedelta(seconds=61), 1, 61),
        (timedelta(days=1) - MICROSECOND, 3600, 82_800),
        (timedelta(days=1), 3600, 86_400),
    ],
)
def test_a_bucket_starts_at_a_multiple_of_its_length(after_epoch: timedelta, bucket_seconds: int, bucket: int) -> None:
    assert bucket_of(EPOCH + after_epoch, bucket_seconds) == bucket


def test_buckets_fit_four_bytes_until_2088() -> None:
    assert -(2**31) <= bucket_of(datetime(2088, 1, 1, tzinfo=UTC), 10) < 2**31
    assert EPOCH.timestamp() == BUCKET_EPOCH


# ---- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        ("192.168.1.50", bytes((2, 32, 0, 4, 192, 168, 1, 50))),
        ("::1", bytes((3, 128, 0, 16)) + bytes(15) + b"\1"),
        ("2001:DB8::a", bytes((3, 128, 0, 16)) + bytes.fromhex("20010db8") + bytes(11) + b"\x0a"),
        ("fe80::1%wlan0", bytes((3, 128, 0, 16)) + bytes.fromhex("fe80") + bytes(13) + b"\1"),
        (" 10.0.0.1 ", bytes((2, 32, 0, 4, 10, 0, 0, 1))),
        ("10.0.0.1%rmnet0", bytes((2, 32, 0, 4, 10, 0, 0, 1))),
        ("unknown", None),
        ("256.1.1.1", None),
        ("10.0.0.0/8", None),
        ("fe80:::1", None),
        ("%wlan0", None),
        ("", None),
    ],
)
def test_an_address_is_packed_in_the_binary_format_of_inet(text: str, packed: bytes | None) -> None:
    assert pack_ip(text) == packed


def test_an_invalid_address_is_dropped_and_the_heartbeat_is_accepted() -> None:
    heartbeat = parse({"network": {"ip": "0x7f.1"}})
    assert (heartbeat.ip, heartbeat.dropped) == (None, ("network.ip",))
    assert parse({"network": {"ip": "10.0.0.1"}}).dropped == ()


# ---- a replayed queue -------------------------------------------------------------------------------------------


def test_an_array_and_lines_are_split_alike() -> None:
    items = [b'{"a":1}', b"7", b'"x"']
    assert parser.split(b"[" + b", ".join(items) + b"]", max_items=3) == items
    assert parser.split(b"\n".join(items), max_items=3) == items
    assert parser.split(b"[]", max_items=3) == parser.split(b"", max_items=3) == []


def test_lines_may_end_with_crlf_and_empty_lines_are_skipped() -> None:
    items = parser.split(b'\n{"a":1}\r\n\r\n  \n{"b":2}\n', max_items=2)
    assert [orjson.loads(item) for item in items] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("ndjson", [True, False])
def test_no_more_items_are_accepted_than_the_limit(ndjson: bool) -> None:
    def body(count: int) -> bytes:
        return b"\n".join([b"1"] * count) if ndjson else b"[" + b",".join([b"1"] * count) + b"]"

    assert len(parser.split(body(500), max_items=500)) == 500
    with pytest.raises(Refused, match=r"501 .* at most 500") as caught:
        parser.split(body(501), max_items=500)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"[1,", 400), (b"[1]x", 400), (b" \n[", 400), (b"[\xff]", 400), (b"[" * 100_000, 400), (b"[1]]", 400)],
)
def test_a_body_that_is_not_an_array_is_refused(body: bytes, status: int) -> None:
    with pytest.raises(Refused) as caught:
        parser.split(body, max_items=500)
    assert caught.value.status == status
    assert caught.value.errors[0].message


# ---- lone surrogates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["device_id", "queue_depth", "fcm_token", "self_heal_hints", "brand_new"])
def test_a_lone_surrogate_in_an_ignored_field_is_accepted(field: str) -> None:
    parse(b'{"timestamp_utc":"%s","%s":"\\ud83d"}' % (timestamp(MADE).encode(), field.encode()))


@pytest.mark.parametrize(
    ("text", "held"),
    [(r"\ud83d\ude00", "\U0001f600"), (r"\\ud83d", r"\ud83d"), (r"\\\\ud83d", r"\\ud83d"), (r"\u00e4", "ä")],
)
def test_a_surrogate_pair_next_to_a_lone_surrogate_is_kept(text: str, held: str) -> None:
    body = f'{{"timestamp_utc":"{timestamp(MADE)}","alias":"{text}","fcm_token":"\\ud83d"}}'
    assert parse(body.encode()).facts.alias == held


def test_a_lone_surrogate_in_one_item_of_a_list_affects_only_that_item() -> None:
    items = parser.split(rb'[1,{"alias":"\ud83d"},2]', max_items=3)
    assert items == [b"1", rb'{"alias":"\u0000"}', b"2"]


PIECES = [rb"\ud83d", rb"\uDE00", rb"\u00e4", rb"\\", rb"\"", rb"\n", b"ud83d", b"x", b" "]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join))
def test_only_lone_surrogates_are_replaced_by_null(text: bytes) -> None:
    """The result is compared with that of Python's json module, which reads a lone surrogate as a character."""
    item = b'{"alias":"%s"}' % text
    [split_item] = parser.split(b"[%s]" % item, max_items=1)
    assert json.loads(split_item)["alias"] == re.sub("[\ud800-\udfff]", "\0", json.loads(item)["alias"])


GOOD = b'{"timestamp_utc":"2026-11-24T02:00:00Z"}'
ITEMS = [
    GOOD, GOOD[:-1] + b',"queue_depth":3.0,"alias":"Store 42"}', GOOD[:-1] + b',"fcm_token":"\\ud83d"}',
    GOOD[:-1] + b',"device_id":7}', GOOD[:-1] + b',"battery":{"pct":101},"battery":{"pct":50}}',
    # items that are invalid, each in a different way
    GOOD[:-1] + b',"alias":"\\u0000"}', GOOD[:-1] + b',"alias":"\\ud83d"}', GOOD[:-1] + b',"alias":' + b"9" * 99 + b"}",
    GOOD[:-1] + b',"battery":{"pct":101,"temperature_c":1e39}}', GOOD[:-1] + b',"alias":"\xff"}', b"{}", b"null", b"7",
    # items after which the boundary between two items is not where it seems to be
    b"", b" \t", b"\r", b"{", b"}", b"[]", b"\0", b"\xef\xbb\xbf" + GOOD, GOOD + b" " + GOOD, GOOD + b"," + GOOD,
    GOOD.replace(b":", b":\n", 1), b'{"timestamp_utc":', b'"2026-11-24T02:00:00Z"}', b"[" * 3_000,
]  # fmt: skip
blocks = st.tuples(
    st.lists(st.sampled_from([GOOD, *ITEMS[:5]] * 4 + ITEMS), max_size=8),
    st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b" \n\t", b",", b",", b" ,\r\n", b",,", b""]),
    st.sampled_from(
        [(b"", b""), (b"", b"\n"), (b"[", b"]"), (b"[", b"]"), (b" [\n", b" ]\n"), (b"[", b""), (b"[", b"]x")]
    ),
).map(lambda part: part[2][0] + part[1].join(part[0]) + part[2][1])


def one_by_one(body: bytes, max_items: int, ndjson: bool) -> list[Heartbeat | str]:
    """Parse each item of a queue separately; return heartbeats and errors."""

    def read(item: bytes) -> Heartbeat | str:
        try:
            return parse(item)
        except Refused as refused:
            return f"{refused.status} {refused}"

    return [read(item) for item in parser.split(body, max_items=max_items, ndjson=ndjson)]


def read_queue(body: bytes, max_items: int, ndjson: bool) -> ParsedQueue:
    """Parse a queue of device 7."""
    return parser.parse_many(
        body, ndjson=ndjson, max_items=max_items, device_no=7, device_id="kiosk-7", received_at=RECEIVED, rules=RULES
    )


def at_once(body: bytes, max_items: int, ndjson: bool) -> list[Heartbeat | str]:
    """Parse the queue as a whole; return heartbeats and errors."""
    queue = read_queue(body, max_items, ndjson)
    results: dict[int, Heartbeat | str] = dict(zip(queue.indices, queue.heartbeats, strict=True))
    results |= {index: f"{refused.status} {refused}" for index, refused in queue.refused.items()}
    return [results[index] for index in range(len(queue))]


def outcome(read: Callable[[bytes, int, bool], list[Heartbeat | str]], *arguments: Any) -> list[Heartbeat | str]:
    """Return the results of `read`, or the error with which it refuses the whole queue."""
    try:
        return read(*arguments)
    except Refused as whole:
        return [f"the whole: {whole.status} {whole}"]


@settings(max_examples=1_500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(blocks, st.sampled_from([500, 500, 2]), st.none() | st.booleans())
@case(b"\n".join([GOOD] * 3), 2, None)
# as many line ends as items
@case(b"\n".join([GOOD + GOOD, b'{"timestamp_utc":', b'"2026-11-24T02:00:00Z"}', GOOD]), 500, None)
@case(b"[" + b",".join([GOOD, ITEMS[6], GOOD]) + b"]", 500, None)
@case(b"\xef\xbb\xbf" + GOOD, 500, None)
@case(b"[]\n" + GOOD, 500, True)
def test_a_queue_parsed_as_a_whole_equals_its_items_parsed_one_by_one(
    body: bytes, max_items: int, ndjson: bool | None
) -> None:
    if ndjson is None:
        ndjson = not body.lstrip().startswith(b"[")
    assert outcome(at_once, body, max_items, ndjson) == outcome(one_by_one, body, max_items, ndjson)


@pytest.mark.parametrize("ndjson", [True, False])
def test_the_bad_items_of_a_queue_are_named_by_index_and_the_others_are_kept(ndjson: bool) -> None:
    items = [GOOD, b"7", GOOD, b"{}"]
    queue = read_queue(b"\n\n".join(items) if ndjson else b"[" + b",".join(items) + b"]", 4, ndjson)
    assert (len(queue), list(queue.indices)) == (4, [0, 2])
    assert queue.heartbeats == [parse(GOOD)] * 2
    assert {index: refused.errors[0].path for index, refused in queue.refused.items()} == {1: "", 3: "timestamp_utc"}


def test_equal_facts_and_labels_are_kept_in_memory_once() -> None:
    first, second = parse(orjson.dumps(example(MADE))), parse(orjson.dumps(example(MADE + timedelta(minutes=1))))
    assert first.label is second.label
    assert first.facts is second.facts


def test_the_last_value_of_a_repeated_field_counts() -> None:
    twice = GOOD[:-1] + b',"battery":{"pct":200},"battery":{"pct":50}}'
    assert parse(twice).battery_pct == 50


# ---- arbitrary bodies -------------------------------------------------------------------------------------------


def check_fits(heartbeat: Heartbeat) -> None:
    """Check that every value fits its column, so that no row can make a batch fail."""
    assert (heartbeat.device_no, heartbeat.device_id, heartbeat.received_at) == (7, "kiosk-7", RECEIVED)
    assert heartbeat.ts.tzinfo is UTC
    assert RECEIVED - RULES.accept_past <= heartbeat.ts <= RECEIVED + RULES.accept_future
    assert not heartbeat.clock_wrong or heartbeat.ts == RECEIVED
    start = EPOCH + timedelta(seconds=heartbeat.bucket)
    assert start <= heartbeat.ts < start + timedelta(seconds=RULES.bucket_seconds)
    for value, low, high in (
        (heartbeat.bucket, -(2**31), 2**31 - 1),
        (heartbeat.battery_pct, 0, 100),
        (heartbeat.signal_dbm, -(2**15), 2**15 - 1),
        (heartbeat.uptime_s, 0, 2**31 - 1),
        (heartbeat.ram_used_mb, 0, 2**31 - 1),
        (heartbeat.facts.sdk_int, -(2**31), 2**31 - 1),
    ):
        assert value is None or (type(value) is int and low <= value <= high)
    for flag in (heartbeat.plugged, heartbeat.unity_running):
        assert flag is None or isinstance(flag, bool)
    if heartbeat.temp_c is not None:
        assert math.isfinite(struct.unpack("f", struct.pack("f", heartbeat.temp_c))[0])
    assert heartbeat.ip is None or len(heartbeat.ip) == 4 + heartbeat.ip[3]
    label, facts = heartbeat.label, heartbeat.facts
    for text, max_length in (
        (label.agent_version, 50), (label.unity_pkg_version, 100), (label.network_type, 32), (label.ssid, 100),
        (facts.alias, 200), (facts.android_version, 50), (facts.patch_level, 50), (facts.build_id, 100),
        (facts.model, 100), (facts.manufacturer, 100),
    ):  # fmt: skip
        assert text is None or (len(text) <= max_length and "\0" not in text and text.encode().decode() == text)
    assert None not in label
    assert heartbeat.claimed_device_id is None or len(heartbeat.claimed_device_id) <= 100
    assert heartbeat.queue_depth is None or 0 <= heartbeat.queue_depth < 2**31


def check_fits_or_is_refused(body: bytes) -> None:
    """Check that a body is parsed or refused, and raises no other error."""
    refused: Refused | None = None
    try:
        check_fits(parse(body))
    except Refused as error:
        refused = error
    if refused:
        assert refused.status in (400, 413, 422)
        assert refused.errors
        assert all(isinstance(error.path, str) and error.message for error in refused.errors)


ANYTHING_MANY = settings(
    max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

texts = st.text(alphabet=st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    ["", "\0", "a\0", "\ud83d", "x" * 51, "x" * 201, "ü" * 101, "wifi", "10.0.0.1", "fe80::1%wlan0", "::", "13"]
)
numbers = st.one_of(
    st.integers(-5, 700),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.5, 87.0, 87.5, 100.5, 1e7, -1, -32_768, 32_768, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0]),
)
moments = st.one_of(
    st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.isoformat()),
    st.datetimes(RECEIVED.replace(tzinfo=None) - timedelta(days=8), RECEIVED.replace(tzinfo=None)).map(
        lambda moment: moment.isoformat() + "Z"
    ),
    st.sampled_from(
        ["2026-11-24T02:00:00", "2026-11-24T02:00:29.9999999Z", "0001-01-01T00:00:00+14:00", "2026-11-24T02:00:60Z"]
    ),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts | moments,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw from `strategy` nine times of ten, otherwise any value."""
    return st.integers(0, 9).flatmap(lambda dice: values if dice == 9 else strategy)


def section(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw an object with some of these fields."""
    return mostly(st.fixed_dictionaries({}, optional={name: mostly(one) for name, one in fields.items()}))


apps = st.dictionaries(
    st.sampled_from([PACKAGE, "another.app"]) | texts,
    section(installed=st.booleans(), version_name=texts, version_code=numbers),
    max_size=2,
)
bodies = st.fixed_dictionaries(
    {"timestamp_utc": mostly(moments)},
    optional={
        "device_id": mostly(texts),
        "alias": mostly(texts),
        "app_version": mostly(texts),
        "app_versions": mostly(apps),
        "battery": section(pct=numbers, charging=st.booleans(), temperature_c=numbers),
        "system": section(
            uptime_seconds=numbers, android_version=texts, sdk_int=numbers, patch_level=texts, build_id=texts,
            model=texts, manufacturer=texts,
        ),
        "memory": section(total_ram_mb=numbers, avail_ram_mb=numbers, pressure_pct=numbers),
        "network": section(transport=texts, ssid=texts, ip=texts, signal_dbm=numbers),
        "signal_dbm": mostly(numbers),
        "unity_process_running": mostly(st.booleans()),
        "monitored_foreground_recent_s": mostly(numbers),
        "queue_depth": mostly(numbers),
        "brand_new": values,
    },
)  # fmt: skip


def dumped(value: Any, *, ascii_only: bool) -> bytes:
    """Encode JSON like the standard library, with NaN, Infinity and lone surrogates."""
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@ANYTHING_MANY
@given(bodies | values, st.booleans())
# The Unity entry is decoded separately; invalid UTF-8 in it once caused a 500.
@case({"timestamp_utc": timestamp(MADE), "app_versions": {PACKAGE: {"version_name": "\ud83d"}}}, False)
def test_any_json_fits_its_columns_or_is_refused_with_a_reason(value: Any, ascii_only: bool) -> None:
    check_fits_or_is_refused(dumped(value, ascii_only=ascii_only))


EXAMPLE = orjson.dumps(example(MADE))
TOKENS = [
    b"null", b"true", b"-1", b"1e999", b"NaN", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0000",
    b"\\ud83d", b"\0", b"\xff", b"\xef\xbb\xbf", b"9" * 40, b"[" * 3_000, b"x" * 300, b"1.5", b"E7", b"Z", b"+25:00",
]  # fmt: skip
edits = st.lists(
    st.tuples(
        st.integers(0, len(EXAMPLE)),
        st.integers(0, 4) | st.integers(0, 200),
        st.sampled_from(TOKENS) | st.binary(max_size=4) | st.just(b""),
    ),
    max_size=3,
)


@ANYTHING_MANY
@given(edits, st.integers(0, len(EXAMPLE)) | st.just(len(EXAMPLE)))
@case([(EXAMPLE.index(b"2.1.0"), 0, b"\x80")], len(EXAMPLE))
def test_the_agents_body_with_any_bytes_changed_fits_or_is_refused(
    changes: list[tuple[int, int, bytes]], end: int
) -> None:
    body = EXAMPLE
    for start, length, replacement in changes:
        body = body[:start] + replacement + body[start + length :]
    check_fits_or_is_refused(body[: end if end < len(EXAMPLE) else len(body)])


# ---- as Gson writes it ------------------------------------------------------------------------------------------


def java_double(value: float) -> str:
    """Format like `Double.toString`: at least one decimal; scientific notation (E) from 10^7 up and below 10^-3."""
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        return repr(value)
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    text = "".join(map(str, digits))
    return f"{'-' * sign}{text[0]}.{text[1:].rstrip('0') or '0'}E{len(text) - 1 + int(exponent)}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(87.0, "87.0"), (31.5, "31.5"), (9_999_999.0, "9999999.0"), (1e7, "1.0E7"), (12_345_678.0, "1.2345678E7"),
     (-1e7, "-1.0E7"), (99_999_995.0, "9.9999995E7"), (2_147_483_647.0, "2.147483647E9"),
     (1e21, "1.0E21"), (0.0001, "1.0E-4")],
)  # fmt: skip
def test_java_double_formats_doubles_like_java(value: float, text: str) -> None:
    assert java_double(value) == text


def gson(value: Any, *, doubles: bool = False) -> str:
    """Encode JSON like the agent: without nulls, and with doubles for the numbers of its Map<String, Any?>."""
    if isinstance(value, dict):
        inner = {key: gson(one, doubles=doubles or key in MAPS) for key, one in value.items() if one is not None}
        return "{" + ",".join(f"{json.dumps(key)}:{text}" for key, text in inner.items()) + "}"
    if doubles and isinstance(value, int | float) and not isinstance(value, bool):
        return java_double(float(value))
    return json.dumps(value, ensure_ascii=False)


MAPS = ("battery", "system", "memory", "network")


def text_up_to(max_length: int) -> st.SearchStrategy[str | None]:
    """Draw a text that a column can store, or None."""
    alphabet = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    return st.none() | st.text(alphabet, min_size=1, max_size=max_length)


whole = st.none() | st.integers(0, 2**31 - 1)
stated = st.fixed_dictionaries(
    {
        "alias": text_up_to(200),
        "app_version": text_up_to(50),
        "battery": st.fixed_dictionaries(
            {
                "pct": st.none() | st.integers(0, 100),
                "charging": st.none() | st.booleans(),
                "temperature_c": st.none() | st.integers(-400, 900).map(lambda tenth: tenth / 10),
            }
        ),
        "system": st.fixed_dictionaries(
            {
                "uptime_seconds": whole, "android_version": text_up_to(50), "sdk_int": whole,
                "patch_level": text_up_to(50), "build_id": text_up_to(100), "model": text_up_to(100),
                "manufacturer": text_up_to(100),
            }
        ),
        "memory": st.fixed_dictionaries({"total_ram_mb": whole, "avail_ram_mb": whole}),
        "network": st.fixed_dictionaries(
            {
                "transport": text_up_to(32),
                "ssid": text_up_to(100),
                "ip": st.none() | st.ip_addresses().map(str),
                "signal_dbm": st.none() | st.integers(-150, 0),
            }
        ),
        "queue_depth": st.none() | st.integers(0, 500),
        "unity_process_running": st.none() | st.booleans(),
        "monitored_foreground_recent_s": st.none() | st.integers(-1, 86_400),
    }
)  # fmt: skip


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stated, st.integers(-7 * 86_400_000_000, 300_000_000), text_up_to(100), st.booleans())
def test_what_gson_writes_is_read_back_unchanged(
    stated: dict[str, Any], offset_us: int, version: str | None, installed: bool
) -> None:
    made_at = RECEIVED + timedelta(microseconds=offset_us)
    apps = {PACKAGE: {"installed": installed, "version_name": version, "version_code": 7}}
    body = stated | {"timestamp_utc": timestamp(made_at), "device_id": "kiosk-7", "app_versions": apps}
    heartbeat = parse(gson(body).encode())
    check_fits(heartbeat)
    battery, system, memory, network = (stated[name] for name in MAPS)
    assert (heartbeat.ts, heartbeat.clock_wrong, heartbeat.claimed_device_id) == (made_at, False, None)
    assert heartbeat.label == Label(
        stated["app_version"] or "",
        (version or "") if installed else "",
        network["transport"] or "",
        network["ssid"] or "",
    )
    assert (heartbeat.battery_pct, heartbeat.plugged) == (battery["pct"], battery["charging"])
    assert heartbeat.temp_c == battery["temperature_c"]
    assert heartbeat.uptime_s == system["uptime_seconds"]
    assert heartbeat.facts == DeviceFacts(
        stated["alias"], *(system[name] for name in DeviceFacts._fields if name != "alias")
    )
    total, available = memory["total_ram_mb"], memory["avail_ram_mb"]
    assert heartbeat.ram_used_mb == (None if total is None or available is None else max(total - available, 0))
    assert heartbeat.ip == (network["ip"] and pack_ip(network["ip"]))
    assert (heartbeat.signal_dbm, heartbeat.queue_depth) == (network["signal_dbm"], stated["queue_depth"])
    recent = stated["monitored_foreground_recent_s"]
    by_foreground = None if recent is None or recent < 0 else recent < 600
    running = stated["unity_process_running"]
    assert heartbeat.unity_running == (None if not installed else by_foreground if running is None else running)
