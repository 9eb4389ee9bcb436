"""Two kiosks that share one token (a cloned image). Pure, and quick for a heartbeat that says what the one before said.

One kiosk reboots, moves to another network or is given another image, and goes on with that. Of two, the heartbeats
change between two models, boots or addresses and back, again and again. Only heartbeats in the order of their time
count: a queue that is replayed from before a reboot comes back to nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import NamedTuple

import msgspec

from nexhb.wire import BUCKET_EPOCH, DeviceFacts, Heartbeat, Label

HELD = 100_000  # devices watched; one more is watched once one was silent for WITHIN_S
WITHIN_S = 3600  # for the changes to count together
BOOT_SLACK_S = 300  # a clock that is set, an uptime that is rounded
CHANGES = 3  # A, B, A, B
CHANGES_OF_ADDRESS = 6  # where nothing but the address tells them apart, within one network


class Kiosk(NamedTuple):
    """What tells one from another."""

    model: str | None
    build_id: str | None
    ip: bytes | None
    boot: int | None  # when it booted, in seconds since BUCKET_EPOCH

    def shown(self) -> dict[str, str | None]:
        """For people."""
        booted = None if self.boot is None else datetime.fromtimestamp(BUCKET_EPOCH + self.boot, UTC)
        address = None if self.ip is None else str(ip_address(self.ip[4:]))
        at = None if booted is None else f"{booted - timedelta(seconds=booted.second):%Y-%m-%dT%H:%M:%SZ}"
        return {"model": self.model, "build_id": self.build_id, "ip": address, "booted_at": at}


class _Seen(msgspec.Struct, gc=False):
    """A device as its last heartbeat left it."""

    bucket: int
    facts: DeviceFacts
    label: Label
    ip: bytes | None
    boot: int | None
    before: Kiosk | None = None  # the one before the last change
    changes: int = 0  # to and fro
    since: int = 0


class Twins:
    """All devices of one daemon."""

    def __init__(self, bucket_seconds: int) -> None:
        self._slack_s = BOOT_SLACK_S + bucket_seconds
        self._seen: dict[int, _Seen] = {}
        self._swept = 0

    def look(self, heartbeat: Heartbeat) -> tuple[Kiosk, Kiosk] | None:
        """The two, each time that the heartbeats change from the one to the other again; None as a rule."""
        seen = self._seen.get(heartbeat.device_no)
        if seen is None:
            self._watch(heartbeat)
            return None
        bucket, uptime = heartbeat.bucket, heartbeat.uptime_s
        if bucket <= seen.bucket:
            return None
        seen.bucket = bucket
        if (
            heartbeat.facts is seen.facts
            and heartbeat.ip == seen.ip
            and (uptime is None or seen.boot is None or -self._slack_s <= bucket - uptime - seen.boot <= self._slack_s)
        ):
            return None
        return self._changed(seen, heartbeat)

    def _same_boot(self, one: int | None, other: int | None) -> bool:
        return one is None or other is None or -self._slack_s <= one - other <= self._slack_s

    def _changed(self, seen: _Seen, heartbeat: Heartbeat) -> tuple[Kiosk, Kiosk] | None:
        boot = _boot(heartbeat)
        last, now = _kiosk(seen.facts, seen.ip, seen.boot), _kiosk(heartbeat.facts, heartbeat.ip, boot)
        same_network = (
            heartbeat.label.ssid == seen.label.ssid and heartbeat.label.network_type == seen.label.network_type
        )
        seen.facts, seen.label, seen.ip, seen.boot = heartbeat.facts, heartbeat.label, heartbeat.ip, boot
        differ = last[:2] != now[:2] or not self._same_boot(last.boot, now.boot)
        if not differ and (last.ip == now.ip or not same_network):
            return None
        back = seen.before is not None and now[:3] == seen.before[:3] and self._same_boot(now.boot, seen.before.boot)
        if not back or heartbeat.bucket - seen.since > WITHIN_S:
            seen.changes, seen.since = 0, heartbeat.bucket
        seen.before = last
        seen.changes += 1
        return (last, now) if seen.changes >= (CHANGES if differ else CHANGES_OF_ADDRESS) else None

    def _watch(self, heartbeat: Heartbeat) -> None:
        if len(self._seen) >= HELD:
            if heartbeat.bucket - self._swept < WITHIN_S // 10:
                return
            self._swept = heartbeat.bucket
            oldest = heartbeat.bucket - WITHIN_S
            self._seen = {number: seen for number, seen in self._seen.items() if seen.bucket > oldest}
            if len(self._seen) >= HELD:
                return
        self._seen[heartbeat.device_no] = _Seen(
            heartbeat.bucket, heartbeat.facts, heartbeat.label, heartbeat.ip, _boot(heartbeat)
        )


def _kiosk(facts: DeviceFacts, ip: bytes | None, boot: int | None) -> Kiosk:
    return Kiosk(facts.model, facts.build_id, ip, boot)


def _boot(heartbeat: Heartbeat) -> int | None:
    return None if heartbeat.uptime_s is None else heartbeat.bucket - heartbeat.uptime_s
