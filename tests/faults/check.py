"""One look at everything, when all is healed: the devices' word against what the database holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.fleet import Device
from nexhb import audit
from tests.faults import stored
from tests.faults.beats import COLUMNS, Beat, Row, facts_of, row_of
from tests.faults.record import ACKNOWLEDGED, What, read
from tests.faults.stored import Key, Stored
from tests.faults.world import World


@dataclass(frozen=True)
class Violation:
    """A promise that was broken: by which word, for whom, and what had happened to it."""

    what: str  # lost · doubled · wrong · stuck · unexpected
    device: int
    beat: Beat | None
    story: str

    def __str__(self) -> str:
        made = f", heartbeat of {self.beat.at.isoformat()} (bucket {self.beat.bucket})" if self.beat else ""
        return f"{self.what}: device {self.device}{made}: {self.story}"


@dataclass
class Words:
    """What the devices wrote down, turned round."""

    acknowledged: set[Beat] = field(default_factory=set)
    unknown: set[Beat] = field(default_factory=set)
    sent: set[Beat] = field(default_factory=set)
    turned_away: list[tuple[Beat, str]] = field(default_factory=list)
    duplicates_from_nothing: list[Beat] = field(default_factory=list)
    stories: dict[Beat, list[str]] = field(default_factory=dict)
    attempts: dict[Beat, list[tuple[float, float]]] = field(default_factory=dict)  # acknowledged: sent, and heard

    def story(self, beat: Beat) -> str:
        """Its way, shortened in the middle."""
        steps = self.stories.get(beat, ["never sent"])
        return " → ".join(steps if len(steps) < 12 else [*steps[:6], "…", *steps[-5:]])


def words_of(path: Path) -> Words:
    """Read the record."""
    words = Words()
    open_since: Counter[Beat] = Counter()  # attempts of each that might have written it
    began = None
    sent_s: dict[Beat, float] = {}  # the last attempt of each
    for entry in read(path):
        began = entry.at_s if began is None else began
        beat, what = entry.beat, entry.what
        words.stories.setdefault(beat, []).append(f"{entry.at_s - began:.2f} s {what} {entry.said}".rstrip())
        if what is What.SENT:
            words.sent.add(beat)
            open_since[beat] += 1
            sent_s[beat] = entry.at_s
        elif what is What.REFUSED:
            open_since[beat] -= 1
        elif what is What.UNKNOWN:
            words.unknown.add(beat)
        elif what is What.TURNED_AWAY:
            words.turned_away.append((beat, entry.said))
        elif what in ACKNOWLEDGED:
            if what is What.DEDUPLICATED and open_since[beat] == 1:
                words.duplicates_from_nothing.append(beat)
            words.acknowledged.add(beat)
            words.attempts.setdefault(beat, []).append((sent_s[beat], entry.at_s))
    for beat in words.sent:  # one whose answer the end of the run cut off
        if beat not in words.acknowledged and open_since[beat] > 0:
            words.unknown.add(beat)
    return words


async def check(world: World) -> list[Violation]:
    """Everything that does not hold."""
    words = words_of(world.record.path)
    async with world.connection() as conn:
        found = await stored.read(conn, world.fleet, world.archive, world.bucket.settings)
        audits = [await audit.audit(conn, day) for day in found.days]
    return [
        *(Violation("wrong", -1, None, f"an archive cannot be read: {why}") for why in found.damaged),
        *_ledger(found, audits),
        *_history(world.fleet, words, found, world.forgiven),
        *_status(world.fleet, words, found),
        *(_violation("wrong", b, f"a healthy device heard {said}", words) for b, said in words.turned_away),
        *(
            _violation("wrong", b, "called a duplicate at its first attempt", words)
            for b in words.duplicates_from_nothing
        ),
    ]


def _ledger(found: Stored, audits: Sequence[audit.Audit]) -> Iterable[Violation]:
    """What was committed of each day, by the ledger that was written with it, is what is there."""
    for day, held in zip(found.days, audits, strict=True):
        rows = sum(len(rows) for rows in found.rows.values() if rows[0][1].date() == day)
        if held.written != rows or held.missing:
            yield Violation("wrong", -1, None, f"the ledger of {day}: {held}, and {rows} rows are there")


def _violation(what: str, beat: Beat, why: str, words: Words) -> Violation:
    return Violation(what, beat.device, beat, f"{why}; {words.story(beat)}")


def _is_forgiven(attempts: Sequence[tuple[float, float]], forgiven: Sequence[tuple[float, float]]) -> bool:
    """Whether each of its acknowledgements came between a copy of the database and the moment at which the copy took
    its place: sent before that, and heard behind the copy."""
    return all(any(heard > copied and sent < swapped for copied, swapped in forgiven) for sent, heard in attempts)


def _history(
    fleet: Sequence[Device], words: Words, found: Stored, forgiven: Sequence[tuple[float, float]]
) -> Iterable[Violation]:
    sent = {(beat.device, beat.bucket): beat for beat in words.sent}
    for beat in sorted(words.acknowledged):
        if (beat.device, beat.bucket) not in found.rows and not _is_forgiven(words.attempts[beat], forgiven):
            yield _violation("lost", beat, "acknowledged, and not there", words)
    for key, rows in sorted(found.rows.items()):
        known = sent.get(key)
        if known is None:
            yield Violation("wrong", key[0], None, f"bucket {key[1]} is there and was never sent: {rows[0]}")
            continue
        if known not in words.acknowledged and known not in words.unknown:
            yield _violation("wrong", known, "there, and only ever refused", words)
        if len(rows) > 1:
            yield _violation("doubled", known, f"{len(rows)} rows", words)
        expected = row_of(fleet, known)
        for row in rows:
            if row != expected:
                yield _violation("wrong", known, f"{_differences(row, expected)}", words)


def _differences(row: Row, expected: Row) -> str:
    return "; ".join(
        f"{name} is {is_!r}, sent was {was!r}"
        for name, is_, was in zip(COLUMNS, row, expected, strict=True)
        if is_ != was
    )


def _status(fleet: Sequence[Device], words: Words, found: Stored) -> Iterable[Violation]:
    """The last status is the newest heartbeat, in every column; so is what the device says of itself."""
    sent = {(beat.device, beat.bucket): beat for beat in words.sent}
    newest: dict[int, Key] = {}
    for key in found.rows:
        newest[key[0]] = max(key, newest.get(key[0], key))
    for device in sorted(newest.keys() | found.statuses.keys()):
        status = found.statuses.get(device)
        last = found.rows[newest[device]][0] if device in newest else None
        if status != last:
            yield Violation("wrong", device, None, f"its last status is {status}, the newest stored is {last}")
        if last is not None and newest[device] in sent:
            said = facts_of(fleet, sent[newest[device]])
            if found.facts.get(device) != said:
                yield Violation("wrong", device, None, f"of itself it said {said}, known is {found.facts.get(device)}")
