"""The pure parts of the comparison: keys, bodies, verdicts, tables, charts."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.compare import bars, page
from bench.compare import found as f
from bench.compare.command import PAGE
from bench.cost import Cost, PerHeartbeat, per_heartbeat
from bench.fleet import BUCKET_US, MICROS, make_fleet
from bench.floors import Orientation
from bench.load import Keys, Span, target
from bench.load.batches import Batches, Form, queue
from bench.report import Outcome, Percentiles, SendLog
from bench.scenarios import COMPARE

FLEET = make_fleet(3, seed=4)
SPAN = Span(1_795_521_600 * MICROS, 20)
TO = target("http://127.0.0.1:8080")

CALM = Percentiles(1.0, 2.0, 4.0, 9.0)
FOUND = f.Found(
    sides={64: f.Side(30_000, 12_000), 256: f.Side(30_000, 18_000)},
    singles={
        f.BARE: f.Rounds((29_000, 30_000, 31_000), PerHeartbeat(30, 0), 256),
        f.NEXHB: f.Rounds((18_000, 17_000, 20_000), PerHeartbeat(50, 10), 256),
        f.FASTAPI: f.Rounds((2_000,), PerHeartbeat(300, 150), 64),
        f.NEXMDM: f.Rounds((400,), PerHeartbeat(900, 300), 64),
        f.NEXMDM_THREADS: f.Rounds((500,), PerHeartbeat(900, 300), 64),
        f.NEXMDM_BCRYPT: f.Rounds((5,), PerHeartbeat(200_000, 300), 4),
    },
    pools={(8, 64): 1_900, (12, 64): 2_000},
    pool=12,
    batch_tries={16: 50_000},
    batches={f.ARRAY: f.Rounds((60_000,), PerHeartbeat(14, 2), 16), f.NDJSON: f.Rounds((40_000,), None, 16)},
    copies={2_000: (90_000, 100_000, 80_000), 10_000: (110_000, 100_000, 99_000)},
    packed_copy=(200_000, 220_000, 210_000),
    paces=(
        f.Pace(333, 333, PerHeartbeat(500, 300), CALM),
        f.Pace(8_333, 8_300, PerHeartbeat(80, 20), CALM),
    ),
    steady=Percentiles(1.5, 2.5, 6.5, 12.0),
    least=Orientation(0.3, 0.05),
    acknowledged=5_000,
    kept=5_000,
    generator_us=12,
    generator_batch_us=0.4,
    others_cores=(0.0, 0.1, 0.7),
    load_average=1.2,
)


def broken(found: f.Found) -> set[str]:
    """The verdicts that are."""
    return {verdict.name for verdict in f.verdicts(found) if not verdict.ok}


# ── keys and bodies ──────────────────────────────────────────────────────────────────────────────────────


def test_stretches_of_keys_follow_each_other_and_end() -> None:
    keys = Keys(SPAN, devices=3)
    taken = [keys.take(7), keys.take(1), keys.buckets(16)]
    assert [each.buckets for each in taken] == [3, 1, 16]
    assert all(before.end_us == after.first_us for before, after in pairwise(taken))
    assert taken[-1].end_us == SPAN.end_us
    with pytest.raises(ValueError, match="1 buckets are wanted, and 0 are left"):
        keys.take(1)


def test_every_heartbeat_of_every_queue_has_a_bucket_of_its_own() -> None:
    queues = [queue(number, FLEET, SPAN, size=10) for number in range(6)]
    keys = {(each.device, made_us // BUCKET_US) for each in queues for made_us in each.made_us}
    assert len(keys) == 60
    assert all(SPAN.first_us <= made_us < SPAN.end_us for each in queues for made_us in each.made_us)
    assert all(list(each.made_us) == sorted(each.made_us) for each in queues)
    with pytest.raises(ValueError, match="queue 6 lies behind"):
        queue(6, FLEET, SPAN, size=10)


@pytest.mark.parametrize(("form", "media"), [("array", "application/json"), ("ndjson", "application/x-ndjson")])
def test_a_body_holds_its_queue_and_the_record_a_line_for_each(form: Form, media: str) -> None:
    queues = [queue(number, FLEET, SPAN, size=4) for number in range(2)]
    requests = Batches(TO, FLEET, queues, form)
    device, first_us, raw = requests.request(1)
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/heartbeats HTTP/1.1\r\n")
    assert f"Content-Type: {media}".encode() in head
    assert head.endswith(f"Content-Length: {len(body)}".encode())
    items = json.loads(body) if form == "array" else [json.loads(line) for line in body.splitlines()]
    assert [item["device_id"] for item in items] == [FLEET[1].device_id] * 4
    sends = SendLog()
    for outcome in (Outcome.WRITTEN, Outcome.FAILED):
        sends.outcome[sends.add(device, first_us)] = outcome
    heartbeats = requests.heartbeats(sends)
    assert list(heartbeats.ts_us) == [*queues[0].made_us, *queues[1].made_us]
    assert list(heartbeats.outcome) == [Outcome.WRITTEN] * 4 + [Outcome.FAILED] * 4


def test_what_runs_beside_a_peer_is_nobody_elses_load() -> None:
    cost = Cost(generator_s=1, server_s=2, server_tree_s=2, machine_s=9, at_s=10, beside_s=5)
    assert cost.others_cores == 0.1
    assert per_heartbeat(cost, 1_000) == (2_000, 5_000)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_keeps_every_floor_but_one_breaks_that_one_alone() -> None:
    assert broken(FOUND) == set()
    singles = dict(FOUND.singles)
    for name, per_s, verdict in (
        (f.BARE, 40_000, "single heartbeats, of the bare handler's rate"),
        (f.FASTAPI, 2_300, "times FastAPI + INSERT"),
        (f.NEXMDM, 460, "times NexMDM's path without bcrypt"),
        (f.NEXMDM_BCRYPT, 19, "times NexMDM's path"),
    ):
        assert broken(replace(FOUND, singles={**singles, name: f.Rounds((per_s,))})) == {verdict}
    slower = {**FOUND.batches, f.ARRAY: f.Rounds((39_000,))}
    assert broken(replace(FOUND, batches=slower)) == {f"{f.ARRAY}: of raw COPY's rows/s"}
    assert len(broken(replace(FOUND, steady=replace(CALM, p99_ms=6.6)))) == 1
    assert len(broken(replace(FOUND, steady=Percentiles()))) == 1
    assert len(broken(replace(FOUND, kept=4_999))) == 1


@pytest.mark.parametrize("cpu", [PerHeartbeat(501, 300), PerHeartbeat(500, 301)])
def test_cpu_a_heartbeat_may_not_grow_with_the_fleet(cpu: PerHeartbeat) -> None:
    slow, fast = FOUND.paces
    assert len(broken(replace(FOUND, paces=(slow, fast._replace(cpu=cpu))))) == 1
    assert broken(replace(FOUND, paces=(slow, fast._replace(sent_per_s=7_000)))) == {
        "share of the higher rate really sent"
    }


def test_medians_count_and_copy_is_taken_at_its_best() -> None:
    assert FOUND.times(f.BARE) == 0.6
    assert FOUND.copy == 100_000
    assert FOUND.p99_bound_ms == 6.5


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────


def test_prose_around_the_markers_stays() -> None:
    text = f"# Before\n\n{page.BEGIN}\nold\n{page.END}\n\nAfter.\n"
    once = page.between(text, "new")
    assert once == f"# Before\n\n{page.BEGIN}\n\nnew\n\n{page.END}\n\nAfter.\n"
    assert page.between(once, "new") == once
    with pytest.raises(page.NoPlaceError):
        page.between("# no markers", "new")


def test_a_broken_verdict_is_said_in_the_table(tmp_path: Path) -> None:
    worse = replace(FOUND, kept=4_998)
    where = tmp_path / "performance.md"
    where.write_text(f"Prose.\n{page.BEGIN}\n{page.END}\n", encoding="utf-8")
    page.write(where, worse, f.verdicts(worse), "today on this")
    text = where.read_text(encoding="utf-8")
    assert "| rows that peers acknowledged and do not have | 2 | ≤ 0 | **broken** |" in text
    assert "`make bench-compare` writes this section. Measured today on this. " in text
    assert "0.10 cores (median), 0.70 (at most) were busy with something else" in text
    assert page.NOT_QUIET in text
    assert page.NOT_QUIET not in page.section(replace(FOUND, others_cores=(0.0, 0.1)), (), "", "")
    assert f"| {f.FASTAPI} | 64 | 2,000 | one | 9 | 300 | 150 |" in text
    named = re.findall(r"\((performance/\w+\.svg)\)", text)
    assert len(named) == 4
    assert all((tmp_path / name).is_file() for name in named)


def test_the_page_that_is_kept_has_its_markers_and_its_charts() -> None:
    text = PAGE.read_text(encoding="utf-8")
    page.between(text, "")
    named = re.findall(r"\((performance/\w+\.svg)\)", text)
    assert all((PAGE.parent / name).is_file() for name in named)


def test_charts_are_xml_that_says_what_it_shows() -> None:
    for text in page.charts(FOUND).values():
        assert ET.fromstring(text).find("{http://www.w3.org/2000/svg}title") is not None  # noqa: S314 - our own
    empty = bars.svg("<&>", [bars.Bar("a & b", (bars.Part(0, "ours"),), "0")], [("ours", "<us>")])
    assert "&lt;&amp;&gt;" in empty
    assert 'width="1.0"' in empty


def test_charts_can_be_read_on_a_dark_page_and_on_a_light_one() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one: str, other: str) -> float:
        dark, bright = sorted((light(one), light(other)))
        return (bright + 0.05) / (dark + 0.05)

    colours = set(re.findall(r"#[0-9a-f]{6}", "".join(page.charts(FOUND).values())))
    assert len(colours) == 4
    assert all(contrast(colour, ground) >= 3 for colour in colours for ground in ("#ffffff", "#0d1117"))


def test_without_the_peers_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else there(name))
    outcome = CliRunner().invoke(app, ["compare", "--quick"])
    assert outcome.exit_code == 2
    said = " ".join(outcome.output.split())
    assert "fastapi" in said
    assert "are not installed: make bench-compare" in said
    assert "[compare]" in outcome.output


def test_a_quick_comparison_has_one_round_and_the_same_parts() -> None:
    quick = COMPARE.quicker()
    assert (quick.rounds, quick.rates, quick.connections) == (
        1, COMPARE.rates, COMPARE.connections,
    )  # fmt: skip
