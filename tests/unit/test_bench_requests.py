"""What a load sends: keys like those of a live fleet, which never repeat, and bodies that the daemon accepts."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from bench.fleet import BUCKET_US, MICROS, UNITY_PACKAGE, make_accounts, make_fleet
from bench.load import Keys, Spliced, due_times, target
from bench.load.requests import QUEUE, Batches, Form
from bench.report import Outcome, SendLog
from nexhb.ingest import parser

TO = target("http://127.0.0.1:8080")
DAY_S = 1_795_478_400
ACCOUNTS = make_accounts(1_000, seed=7)
BUCKETS = range(DAY_S, DAY_S + 20, 10)


def seconds(text: str) -> float:
    """Return an instant in seconds since 1970."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("now", "end"),
    [
        ("2026-11-24T12:00:07", "2026-11-24T12:00:00"),
        # the buckets are in one day if possible
        ("2026-11-24T00:05:00", "2026-11-24T00:00:00"),
        ("2026-11-24T00:20:00", "2026-11-24T00:20:00"),
    ],
)
def test_keys_end_now_and_lie_in_one_day(now: str, end: str) -> None:
    rest = Keys(200_000, 2_000, seconds(now)).rest
    assert (len(rest), rest.stop) == (100, seconds(end))


def test_keys_are_no_older_than_the_server_accepts() -> None:
    assert len(Keys(10**9, 1).rest) == 6 * 8_640


def test_parts_of_keys_follow_each_other_and_end() -> None:
    keys = Keys(60, 3)
    taken = [keys.holding(7), keys.holding(1), keys.buckets(16)]
    assert [len(each) for each in taken] == [3, 1, 16]
    assert all(before.stop == after.start for before, after in pairwise(taken))
    with pytest.raises(ValueError, match="1 buckets requested, 0 left"):
        keys.holding(1)


def test_each_stage_sends_at_its_rate_and_in_order() -> None:
    due = due_times((10, 3), (200, 2), (10, 1))
    assert list(due) == sorted(due)
    by_second = Counter(at // MICROS for at in due)
    assert [by_second[second] for second in range(7)] == [10, 10, 10, 200, 200, 10, 0]


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_small_crowd_is_the_head_of_a_large_one() -> None:
    assert len({account.token for account in ACCOUNTS} | {account.device_id for account in ACCOUNTS}) == 2_000
    assert make_accounts(10, seed=7) == ACCOUNTS[:10]
    assert not set(make_accounts(10, seed=8)) & set(ACCOUNTS)


def test_each_spliced_request_is_a_heartbeat_of_its_device_in_a_bucket_of_its_own() -> None:
    requests = Spliced(TO, ACCOUNTS, BUCKETS)
    assert len(requests) == 2_000
    rules = parser.HeartbeatRules(UNITY_PACKAGE, 10, timedelta(days=7), timedelta(minutes=5))
    keys, ssids, newest = set(), set(), [0] * len(ACCOUNTS)
    for number in range(len(requests)):
        device, ts_us, raw = requests.request(number)
        head, _, body = raw.partition(b"\r\n\r\n")
        assert f"Bearer {ACCOUNTS[device].token}\r\n".encode() in head
        assert head.endswith(b"Content-Length: %d" % len(body))
        said = json.loads(body)
        assert said["device_id"] == ACCOUNTS[device].device_id
        assert said["alias"].startswith(f"Store {device // 8:05d} - kiosk ")
        received = datetime.fromtimestamp(ts_us / 1e6, UTC)
        heartbeat = parser.parse(body, device_no=1, device_id="d", received_at=received, rules=rules)
        assert round(heartbeat.ts.timestamp() * 1e6) == ts_us > newest[device]
        assert not heartbeat.clock_wrong
        newest[device] = ts_us
        keys.add((device, ts_us // BUCKET_US))
        ssids.add(heartbeat.label.ssid)
    assert len(keys) == 2_000
    assert {bucket * 10 for _, bucket in keys} == set(BUCKETS)
    # each shop has its own network, so that there are as many labels as in a real fleet
    assert len(ssids) > 100


def test_the_length_of_a_spliced_body_follows_the_id() -> None:
    account = ACCOUNTS[0]._replace(device_id="kiosk-1")
    head, _, body = Spliced(TO, [account], BUCKETS).request(0)[2].partition(b"\r\n\r\n")
    assert head.endswith(b"Content-Length: %d" % len(body))
    assert json.loads(body)["device_id"] == "kiosk-1"


def test_a_bucket_is_sent_in_a_random_order_that_comes_again() -> None:
    first, again = (Spliced(TO, ACCOUNTS, BUCKETS) for _ in range(2))
    order = [first.request(number)[0] for number in range(1_000)]
    assert sorted(order) == list(range(1_000)) != order
    assert order == [again.request(number)[0] for number in range(1_000)]
    later = Spliced(TO, ACCOUNTS, range(DAY_S + 20, DAY_S + 30, 10))
    assert order != [later.request(number)[0] for number in range(1_000)]


@pytest.mark.parametrize(("form", "media"), [("array", "application/json"), ("ndjson", "application/x-ndjson")])
def test_a_batch_has_a_queue_and_the_record_a_line_for_each_heartbeat(form: Form, media: str) -> None:
    fleet, buckets = make_fleet(3, seed=4), range(DAY_S, DAY_S + 10 * QUEUE, 10)
    requests = Batches(TO, fleet, buckets, form, range(3))
    device, first_us, raw = requests.request(1)
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/heartbeats HTTP/1.1\r\n")
    assert f"Content-Type: {media}".encode() in head
    assert head.endswith(f"Content-Length: {len(body)}".encode())
    items = json.loads(body) if form == "array" else [json.loads(line) for line in body.splitlines()]
    assert [item["device_id"] for item in items] == [fleet[1].device_id] * QUEUE
    sends = SendLog()
    for outcome in (Outcome.WRITTEN, Outcome.FAILED):
        sends.outcome[sends.add(device, first_us)] = outcome
    heartbeats = requests.heartbeats(sends)
    keys = set(zip(heartbeats.device, (ts_us // BUCKET_US for ts_us in heartbeats.ts_us), strict=True))
    assert len(keys) == len(heartbeats) == 2 * QUEUE
    assert list(heartbeats.outcome) == [Outcome.WRITTEN] * QUEUE + [Outcome.FAILED] * QUEUE
    with pytest.raises(ValueError, match="queue 3 needs more"):
        Batches(TO, fleet, buckets, form, [3])
