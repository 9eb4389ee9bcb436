"""The check at the end of a run, when all faults have ended: compare the devices' journal with the rows in the database
and the archives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.fleet import Device
from nexhb import audit
from tests.faults import stored
from tests.faults.heartbeats import COLUMNS, Heartbeat, Row, facts_of, row_of
from tests.faults.journal import ACKNOWLEDGED, Event, read
from tests.faults.stored import Key, Stored
from tests.faults.world import World


@dataclass(frozen=True)
class Violation:
    """A broken promise: the verdict, the device and the heartbeat concerned, and the reason."""

    verdict: str  # lost · doubled · wrong · stuck · unexpected
    device: int
    heartbeat: Heartbeat | None
    reason: str  # including what happened to the heartbeat

    def __str__(self) -> str:
        made = (
            f", heartbeat of {self.heartbeat.at.isoformat()} (bucket {self.heartbeat.bucket})" if self.heartbeat else ""
        )
        return f"{self.verdict}: device {self.device}{made}: {self.reason}"


@dataclass
class JournalSummary:
    """The entries of the journal, grouped by outcome and by heartbeat."""

    acknowledged: set[Heartbeat] = field(default_factory=set)
    unknown: set[Heartbeat] = field(default_factory=set)
    sent: set[Heartbeat] = field(default_factory=set)
    rejected: list[tuple[Heartbeat, str]] = field(default_factory=list)
    duplicates_at_first_attempt: list[Heartbeat] = field(default_factory=list)
    stories: dict[Heartbeat, list[str]] = field(default_factory=dict)
    # Of each acknowledged attempt: when the request was sent, and when the response was received.
    attempts: dict[Heartbeat, list[tuple[float, float]]] = field(default_factory=dict)

    def story(self, heartbeat: Heartbeat) -> str:
        """Return the heartbeat's history as one text, shortened in the middle."""
        steps = self.stories.get(heartbeat, ["never sent"])
        return " → ".join(steps if len(steps) < 12 else [*steps[:6], "…", *steps[-5:]])


def summarize(path: Path) -> JournalSummary:
    """Return the summary of the journal at `path`."""
    journal = JournalSummary()
    may_have_stored: Counter[Heartbeat] = (
        Counter()
    )  # for each heartbeat, the number of attempts that may have stored it
    began = None
    sent_s: dict[Heartbeat, float] = {}  # for each heartbeat, the time at which its last attempt was sent
    for entry in read(path):
        began = entry.at_s if began is None else began
        heartbeat, event = entry.heartbeat, entry.event
        journal.stories.setdefault(heartbeat, []).append(f"{entry.at_s - began:.2f} s {event} {entry.detail}".rstrip())
        if event is Event.SENT:
            journal.sent.add(heartbeat)
            may_have_stored[heartbeat] += 1
            sent_s[heartbeat] = entry.at_s
        elif event is Event.REFUSED:
            may_have_stored[heartbeat] -= 1
        elif event is Event.UNKNOWN:
            journal.unknown.add(heartbeat)
        elif event is Event.REJECTED:
            journal.rejected.append((heartbeat, entry.detail))
        elif event in ACKNOWLEDGED:
            if event is Event.DEDUPLICATED and may_have_stored[heartbeat] == 1:
                journal.duplicates_at_first_attempt.append(heartbeat)
            journal.acknowledged.add(heartbeat)
            journal.attempts.setdefault(heartbeat, []).append((sent_s[heartbeat], entry.at_s))
    for heartbeat in journal.sent:  # an attempt without a response at the run's end may have stored it
        if heartbeat not in journal.acknowledged and may_have_stored[heartbeat] > 0:
            journal.unknown.add(heartbeat)
    return journal


async def check(world: World) -> list[Violation]:
    """Compare the journal with the database and the archives, and return every violation."""
    journal = summarize(world.journal.path)
    async with world.connection() as conn:
        contents = await stored.read(conn, world.fleet, world.archive, world.s3.settings)
        audits = [await audit.audit(conn, day) for day in contents.days]
    return [
        *(Violation("wrong", -1, None, f"an archive cannot be read: {why}") for why in contents.damaged),
        *_ledger(contents, audits),
        *_history(world.fleet, journal, contents, world.allowed_losses),
        *_status(world.fleet, journal, contents),
        *(_violation("wrong", b, f"a healthy device received {status}", journal) for b, status in journal.rejected),
        *(
            _violation("wrong", b, "acknowledged as a duplicate at its first attempt", journal)
            for b in journal.duplicates_at_first_attempt
        ),
    ]


def _ledger(contents: Stored, audits: Sequence[audit.Audit]) -> Iterable[Violation]:
    """Yield each day whose stored rows differ from its ledger, which was written together with the rows."""
    for day, ledger in zip(contents.days, audits, strict=True):
        rows = sum(len(rows) for rows in contents.rows.values() if rows[0][1].date() == day)
        if ledger.written != rows or ledger.missing:
            yield Violation("wrong", -1, None, f"{day} has {rows} rows, but its ledger is {ledger}")


def _violation(verdict: str, heartbeat: Heartbeat, reason: str, journal: JournalSummary) -> Violation:
    return Violation(verdict, heartbeat.device, heartbeat, f"{reason}; {journal.story(heartbeat)}")


def _is_loss_allowed(attempts: Sequence[tuple[float, float]], allowed_losses: Sequence[tuple[float, float]]) -> bool:
    """Return whether a heartbeat may be lost because an older copy of the database replaced the database: each
    acknowledged attempt was sent before such a replacement, and received its response after the copy was made."""
    return all(
        any(received > copied and sent < replaced for copied, replaced in allowed_losses) for sent, received in attempts
    )


def _history(
    fleet: Sequence[Device], journal: JournalSummary, contents: Stored, allowed_losses: Sequence[tuple[float, float]]
) -> Iterable[Violation]:
    sent = {(heartbeat.device, heartbeat.bucket): heartbeat for heartbeat in journal.sent}
    for heartbeat in sorted(journal.acknowledged):
        is_stored = (heartbeat.device, heartbeat.bucket) in contents.rows
        if not is_stored and not _is_loss_allowed(journal.attempts[heartbeat], allowed_losses):
            yield _violation("lost", heartbeat, "acknowledged, but not stored", journal)
    for key, rows in sorted(contents.rows.items()):
        heartbeat_sent = sent.get(key)
        if heartbeat_sent is None:
            yield Violation("wrong", key[0], None, f"bucket {key[1]} is stored, but was never sent: {rows[0]}")
            continue
        if heartbeat_sent not in journal.acknowledged and heartbeat_sent not in journal.unknown:
            yield _violation("wrong", heartbeat_sent, "stored, although each attempt was refused", journal)
        if len(rows) > 1:
            yield _violation("doubled", heartbeat_sent, f"{len(rows)} rows", journal)
        expected = row_of(fleet, heartbeat_sent)
        for row in rows:
            if row != expected:
                yield _violation("wrong", heartbeat_sent, f"{_differences(row, expected)}", journal)


def _differences(row: Row, expected: Row) -> str:
    return "; ".join(
        f"{name} is {actual!r} instead of {sent!r}"
        for name, actual, sent in zip(COLUMNS, row, expected, strict=True)
        if actual != sent
    )


def _status(fleet: Sequence[Device], journal: JournalSummary, contents: Stored) -> Iterable[Violation]:
    """Yield each device whose last status differs from its newest stored heartbeat in any column, or whose facts
    differ from what that heartbeat states about the device."""
    sent = {(heartbeat.device, heartbeat.bucket): heartbeat for heartbeat in journal.sent}
    newest: dict[int, Key] = {}
    for key in contents.rows:
        newest[key[0]] = max(key, newest.get(key[0], key))
    for device in sorted(newest.keys() | contents.statuses.keys()):
        status = contents.statuses.get(device)
        last = contents.rows[newest[device]][0] if device in newest else None
        if status != last:
            yield Violation("wrong", device, None, f"its last status is {status}, its newest row is {last}")
        if last is not None and newest[device] in sent:
            facts = facts_of(fleet, sent[newest[device]])
            if contents.facts.get(device) != facts:
                yield Violation("wrong", device, None, f"stored facts {contents.facts.get(device)} instead of {facts}")
