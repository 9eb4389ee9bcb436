"""The text of a message: it shows what devices and operators entered, and lets no service interpret it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from nexhb.messages.deciding import Present, Told, due
from nexhb.messages.message import NOT_READY, OPENED, REMINDER, RESOLVED, WIDENED, Message, harmless

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DEVICE = {"kind": "offline", "scope": "device", "device_id": "kiosk-1", "device_name": None, "site": None}
SITE = {"kind": "offline", "scope": "site", "site": "store-42", "site_name": "Berlin", "members": 38, "devices": 40}


@pytest.mark.parametrize(
    ("kind", "data", "title"),
    [
        (OPENED, DEVICE, "kiosk-1 is offline"),
        (RESOLVED, DEVICE | {"device_name": "Till 3", "site": "s", "site_name": None},
         "Resolved: Till 3 (s) is online again"),
        (REMINDER, DEVICE | {"kind": "unity_down"}, "Still: kiosk-1 is without a running Unity app"),
        (OPENED, SITE, "38 devices of site Berlin are offline"),
        (WIDENED, {"kind": "offline", "scope": "fleet", "members": 900}, "Wider: 900 devices of the fleet are offline"),
        (RESOLVED, SITE | {"remaining": 1}, "Resolved: 40 devices of site Berlin are online again, but for 1"),
        (OPENED, {"kind": "nightly_failed", "scope": "ours"}, "nexhb: its nightly run failed"),
        (NOT_READY, {"host": "nexhb-1"}, "nexhb on nexhb-1 cannot accept heartbeats"),
    ],
)  # fmt: skip
def test_a_title_says_what_happened(kind: str, data: dict[str, object], title: str) -> None:
    assert Message("msg_1", kind, NOW, data).title() == title


def test_the_rest_has_the_cause_the_times_the_remaining_devices_and_the_id() -> None:
    data = SITE | {"cause": "power", "since": "2026-06-01T12:00:00Z", "remaining": 3, "remaining_devices": ["a", "b"]}
    lines = Message("msg_1", RESOLVED, NOW, data).text().splitlines()
    assert lines == [
        "cause: power", "since: 2026-06-01T12:00:00Z", "site: store-42", "still affected: a, b and 1 more", "msg_1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "@everyone", "<@123>", "<!channel>", "#general", "http://evil.example/x", "https://evil.example",
        "evil.example", "www.evil.example", "mailto:a@b.example", "tel:+4930", "[a](http://b)", "*bold*", "_it_",
        "~~s~~", "`code`", "||spoiler||", "> quote", "a\nb", "a\r\n- b", "&lt;b&gt;", "\\*", "a\u202eb",
        "@\u200beveryone", "__init__",
    ],
)  # fmt: skip
def test_no_mention_link_or_formatting_survives(text: str) -> None:
    shown = harmless(text)
    assert not set(shown) & set("@<>#&*~|`\\[]\n\r\u202e\u200b"), shown
    assert "://" not in shown
    assert ".example" not in shown
    assert not shown.startswith("_")
    assert not shown.endswith("_")
    assert "tel:" not in shown
    assert "mailto:" not in shown


@pytest.mark.parametrize(
    "text", ["kiosk_1", "Store 42 - kiosk 3", "1.0.9", "192.168.1.50", "12:30", "渋谷店 3号機", "A/B (x)"]
)
def test_usual_names_are_shown_as_they_are(text: str) -> None:
    assert harmless(text) == text


def test_a_long_name_is_cut() -> None:
    assert len(harmless("x" * 5_000)) == 100


# ---- what is due ----------------------------------------------------------------------------------------------------

OPEN, ENDED = Present("device", is_open=True), Present("device", is_open=False)
TOLD = Told("device", NOW - timedelta(hours=1))
HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("present", "told", "reminder", "kind"),
    [
        (OPEN, None, None, OPENED),
        (OPEN, TOLD, None, None),
        (Present("site", is_open=True), TOLD, None, WIDENED),
        (Present("fleet", is_open=True), Told("site", NOW), None, WIDENED),
        (OPEN, Told("site", NOW), None, None),
        (OPEN, TOLD, HOUR, REMINDER),
        (OPEN, TOLD, 2 * HOUR, None),
        (Present("device", is_open=True, is_acked=True), TOLD, HOUR, None),
        (ENDED, TOLD, None, RESOLVED),
        (ENDED, None, None, None),
    ],
)  # fmt: skip
def test_a_message_is_due_by_what_the_route_was_told(
    present: Present, told: Told | None, reminder: timedelta | None, kind: str | None
) -> None:
    assert due(present, told, NOW, matches=True, held=False, reminder=reminder) == kind
    assert due(present, told, NOW, matches=True, held=True, reminder=reminder) is None


def test_a_route_that_does_not_match_is_told_only_of_the_end_of_what_it_was_told() -> None:
    assert due(OPEN, None, NOW, matches=False, held=False, reminder=None) is None
    assert due(ENDED, TOLD, NOW, matches=False, held=False, reminder=None) == RESOLVED
