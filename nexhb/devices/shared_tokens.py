"""Detect two kiosks that share one token (a cloned image). Pure, and fast if a heartbeat equals the previous one.

A single kiosk may reboot, move to another network or receive another image, but then it keeps its new state. The
heartbeats of two kiosks alternate between two models, boots or addresses, again and again. Heartbeats count only in
the order of their time: otherwise a queue replayed from before a reboot would look like a second kiosk.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import NamedTuple

import msgspec

from nexhb.heartbeat import BUCKET_EPOCH, DeviceFacts, Heartbeat, Label

MAX_DEVICES = 100_000  # limit of watched devices; a device that is silent for WITHIN_S makes room
WITHIN_S = 3600  # seconds; the changes count together only within this time
BOOT_SLACK_S = 300  # seconds; boot times may differ by this, as clocks are adjusted and uptimes rounded
CHANGES = 3  # number of changes that show two kiosks: A, B, A, B
CHANGES_OF_ADDRESS = 6  # the same limit if only the address differs, within one network


class Kiosk(NamedTuple):
    """What distinguishes one kiosk from another."""

    model: str | None
    build_id: str | None
    ip: bytes | None
    boot: int | None  # time of the last boot, in seconds since BUCKET_EPOCH

    def shown(self) -> dict[str, str | None]:
        """Return the fields in readable form."""
        booted = None if self.boot is None else datetime.fromtimestamp(BUCKET_EPOCH + self.boot, UTC)
        address = None if self.ip is None else str(ip_address(self.ip[4:]))
        at = None if booted is None else f"{booted - timedelta(seconds=booted.second):%Y-%m-%dT%H:%M:%SZ}"
        return {"model": self.model, "build_id": self.build_id, "ip": address, "booted_at": at}


class _Seen(msgspec.Struct, gc=False):
    """The state of a device after its last heartbeat."""

    bucket: int
    facts: DeviceFacts
    label: Label
    ip: bytes | None
    boot: int | None
    before: Kiosk | None = None  # the kiosk before the last change
    changes: int = 0  # number of changes between `before` and the present kiosk
    since: int = 0  # the bucket of the first change that `changes` counts


class SharedTokenDetector:
    """Watch the heartbeats of all devices that send to this daemon."""

    def __init__(self, bucket_seconds: int) -> None:
        self._slack_s = BOOT_SLACK_S + bucket_seconds
        self._seen: dict[int, _Seen] = {}
        self._swept = 0

    def check(self, heartbeat: Heartbeat) -> tuple[Kiosk, Kiosk] | None:
        """Return both kiosks if two share the token and this heartbeat switches between them; None otherwise."""
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
        return self._record_change(seen, heartbeat)

    def _is_same_boot(self, boot: int | None, other_boot: int | None) -> bool:
        return boot is None or other_boot is None or -self._slack_s <= boot - other_boot <= self._slack_s

    def _record_change(self, seen: _Seen, heartbeat: Heartbeat) -> tuple[Kiosk, Kiosk] | None:
        boot = _boot(heartbeat)
        last, now = _kiosk(seen.facts, seen.ip, seen.boot), _kiosk(heartbeat.facts, heartbeat.ip, boot)
        is_same_network = (
            heartbeat.label.ssid == seen.label.ssid and heartbeat.label.network_type == seen.label.network_type
        )
        seen.facts, seen.label, seen.ip, seen.boot = heartbeat.facts, heartbeat.label, heartbeat.ip, boot
        differs = last[:2] != now[:2] or not self._is_same_boot(last.boot, now.boot)
        if not differs and (last.ip == now.ip or not is_same_network):
            return None
        before = seen.before
        is_back = before is not None and now[:3] == before[:3] and self._is_same_boot(now.boot, before.boot)
        if not is_back or heartbeat.bucket - seen.since > WITHIN_S:
            seen.changes, seen.since = 0, heartbeat.bucket
        seen.before = last
        seen.changes += 1
        return (last, now) if seen.changes >= (CHANGES if differs else CHANGES_OF_ADDRESS) else None

    def _watch(self, heartbeat: Heartbeat) -> None:
        if len(self._seen) >= MAX_DEVICES:
            if heartbeat.bucket - self._swept < WITHIN_S // 10:
                return
            self._swept = heartbeat.bucket
            oldest = heartbeat.bucket - WITHIN_S
            self._seen = {number: seen for number, seen in self._seen.items() if seen.bucket > oldest}
            if len(self._seen) >= MAX_DEVICES:
                return
        self._seen[heartbeat.device_no] = _Seen(
            heartbeat.bucket, heartbeat.facts, heartbeat.label, heartbeat.ip, _boot(heartbeat)
        )


def _kiosk(facts: DeviceFacts, ip: bytes | None, boot: int | None) -> Kiosk:
    return Kiosk(facts.model, facts.build_id, ip, boot)


def _boot(heartbeat: Heartbeat) -> int | None:
    return None if heartbeat.uptime_s is None else heartbeat.bucket - heartbeat.uptime_s
