"""Every alert fires and clears, leads to a paragraph of the runbook, and asks for metrics that a daemon really exports;
and so does every panel of the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from nexhb import devices
from tests.conftest import ADMIN_KEY, Nexhb, example
from tests.promises.runbook import anchors
from tests.promises.test_metric_names import Scrape, scrape

HOUSE = Path(__file__).parents[2]
FOLDER = HOUSE / "packaging" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "nexhb.rules.yml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
TESTS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "nexhb.rules.test.yml").read_text())["tests"]
DASHBOARD: dict[str, Any] = json.loads((HOUSE / "packaging" / "grafana" / "nexhb.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: the package prometheus)"
)


# ---- the rules ------------------------------------------------------------------------------------------------------


def promtool(*words: str | Path) -> str:
    """What it says; its refusal is the test's."""
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_prometheus_takes_the_rules_and_the_scrape_configuration(tmp_path: Path) -> None:
    promtool("check", "rules", "--lint-fatal", FOLDER / "nexhb.rules.yml")
    example_of = (FOLDER / "prometheus.example.yml").read_text()
    key = tmp_path / "nexhb_admin_key"
    key.write_text("a key")
    shutil.copy(FOLDER / "nexhb.rules.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(example_of.replace("/etc/prometheus/nexhb_admin_key", str(key)))
    promtool("check", "config", tmp_path / "prometheus.yml")


@needs_promtool
def test_each_alert_fires_with_its_words_and_clears() -> None:
    promtool("test", "rules", FOLDER / "nexhb.rules.test.yml")


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_test_in_which_it_fires_and_clears(name: str) -> None:
    checks = [check for test in TESTS for check in test["alert_rule_test"] if check["alertname"] == name]
    assert any(check["exp_alerts"] for check in checks), "it never fires"
    for test in TESTS:
        mine = [check for check in test["alert_rule_test"] if check["alertname"] == name]
        assert not mine or mine[-1]["exp_alerts"] == [], f"{test['name']}: it never clears"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_urgent_it_is_what_is_wrong_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    said = rule["annotations"]
    assert set(said) == {"summary", "description", "runbook_url"}
    path, _, anchor = said["runbook_url"].partition("#")
    assert anchor == name.lower()
    assert anchor in anchors((HOUSE / path).read_text())


def test_a_rule_is_recorded_where_two_want_it() -> None:
    wanting = [rule["expr"] for rule in RULES] + [target["expr"] for panel in PANELS for target in panel["targets"]]
    for name in RECORDED:
        assert sum(name in expr for expr in wanting) >= 2, name


def test_the_scrape_is_the_job_that_the_alerts_look_for() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.example.yml").read_text())["scrape_configs"]
    assert f'up{{job="{job["job_name"]}"}}' in ALERTS["NexhbDown"]["expr"]


# ---- what is exported -----------------------------------------------------------------------------------------------

# By Prometheus itself.
OF_PROMETHEUS = {
    "up": {"instance", "job"},
    "ALERTS": {"alertname", "alertstate", "severity"},
} | {name: set[str]() for name in RECORDED}


class Selector(NamedTuple):
    """A metric as an expression asks for it."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, =, =~, != or !~, value
    grouped: frozenset[str]  # the labels that the expression groups by


_WORDS = frozenset(("by", "without", "on", "ignoring", "and", "or", "unless", "bool"))
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(\s*\()?")


def selectors(expr: str) -> Iterator[Selector]:
    """The selectors of a PromQL expression: names that are no functions and no words of the language."""
    grouped = frozenset(re.findall(r"\w+", " ".join(_GROUPING.findall(expr))))
    rest = re.sub(r"\[[^\]]*\]|\boffset\s+\w+", "", _GROUPING.sub("", expr))
    for name, braces, called in _SELECTOR.findall(rest):
        if not called and name not in _WORDS:
            yield Selector(name, tuple(re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', braces)), grouped)


def test_selectors_are_found_in_an_expression() -> None:
    expr = 'sum by (le, kind) (rate(a_total{x=~"b|c"}[5m])) / on (y) b:c > 2 ^ 30 and max(d offset 1d) or vector(0)'
    assert [(s.name, s.matchers) for s in selectors(expr)] == [
        ("a_total", (("x", "=~", "b|c"),)), ("b:c", ()), ("d", ()),
    ]  # fmt: skip
    assert next(selectors(expr)).grouped == {"le", "kind", "y"}


def declared() -> dict[str, set[str]]:
    """The labels of every metric that is declared, by the names of its samples: one that counts something rare has no
    sample yet."""
    found: dict[str, set[str]] = {}
    for one in list(REGISTRY._collector_to_names):
        if isinstance(one, MetricWrapperBase):
            for family in one.describe():
                labels = set(one._labelnames)
                for suffix in ("", "_total", "_bucket", "_count", "_sum"):
                    found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def as_scraped(labels: dict[str, str]) -> dict[str, str]:
    """As Prometheus stores a sample: it has labels of its own, and renames ours that are called like them."""
    ours = {f"exported_{name}" if name in ("job", "instance") else name: value for name, value in labels.items()}
    return ours | {"job": "nexhb", "instance": "127.0.0.1:8080"}


class Exports:
    """What daemons say, as Prometheus stores it."""

    def __init__(self, scraped: Scrape) -> None:
        self._labels = OF_PROMETHEUS | {
            name: set(as_scraped(dict.fromkeys(labels, ""))) for name, labels in declared().items()
        }
        self._samples: dict[str, list[dict[str, str]]] = {}
        for sample in scraped.samples:
            stored = as_scraped(sample.labels)
            self._samples.setdefault(sample.name, []).append(stored)
            self._labels.setdefault(sample.name, set(stored))

    def lacking(self, expr: str) -> Iterator[str]:
        """What an expression asks for and nobody says."""
        there: set[str] = set()
        asked = list(selectors(expr))
        for selector in asked:
            labels = self._labels.get(selector.name)
            if labels is None:
                yield f"{selector.name} is not exported"
                continue
            there |= labels
            yield from (
                f"{selector.name} has no label {name}" for name, _, _ in selector.matchers if name not in labels
            )
            yield from self._unmatched(selector)
        yield from (f"nothing has the label {name}" for name in asked[0].grouped - there)

    def _unmatched(self, selector: Selector) -> Iterator[str]:
        """Values that no sample has, where there are samples. Not every status can be had in a test."""
        samples = self._samples.get(selector.name, [])
        for name, how, value in selector.matchers:
            wanted = re.compile(value if how == "=~" else re.escape(value))
            found = any(wanted.fullmatch(sample.get(name, "")) for sample in samples)
            if samples and not found and name != "status" and "$" not in value:
                yield f"no sample of {selector.name} has {name}{how}{value}"


@pytest.fixture
async def exports(nexhb: Nexhb, now: datetime) -> Exports:
    """/metrics of a daemon that has seen what the expressions ask for."""
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    assert (await agent.post(orjson.dumps(example(now, network={"ip": "x"})))).status == 200
    assert (await agent.post(b"{")).status == 400
    assert (await agent.post(b"[]", "/v1/heartbeats")).status == 200
    agent.token = devices.new_token()
    assert (await agent.send(now)).status == 401
    for job in ("nightly", "reconcile"):
        async with nexhb.http.post(f"{nexhb.url}/ops/{job}", headers={"x-admin": ADMIN_KEY}) as response:
            assert response.status == 200
    async with nexhb.http.get(f"{nexhb.url}/v1/fleet") as response:
        assert response.status == 401
    await nexhb.get("/v1/fleet")
    await nexhb.get("/v1/devices/offline")
    return Exports(await scrape(nexhb))


async def test_every_metric_and_label_of_a_rule_is_exported(exports: Exports) -> None:
    for rule in RULES:
        name = rule.get("alert", rule.get("record"))
        assert list(exports.lacking(rule["expr"])) == [], name
        words = " ".join(rule.get("annotations", {}).values())
        for label in re.findall(r"\$labels\.(\w+)", words):
            assert label in rule["expr"] or label in {"instance", "job"}, f"{name} speaks of {label}"


async def test_every_metric_and_label_of_a_panel_is_exported(exports: Exports) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            assert list(exports.lacking(target["expr"])) == [], panel["title"]


async def test_a_name_a_label_or_a_value_that_is_not_exported_is_found(exports: Exports) -> None:
    assert list(exports.lacking("rate(hb_written_total[5m]) > 0")) == ["hb_written_total is not exported"]
    assert "nexhb_ready has no label host" in exports.lacking('nexhb_ready{host="a"} == 0')
    assert list(exports.lacking("sum by (kind) (nexhb_ready)")) == ["nothing has the label kind"]
    assert list(exports.lacking('nexhb_partitions{state="failed"} > 0')) == [
        "no sample of nexhb_partitions has state=failed"
    ]
    assert list(exports.lacking('nexhb_job_duration_seconds{job="nightly"}')) == [
        "no sample of nexhb_job_duration_seconds has job=nightly"
    ]
    assert list(exports.lacking('nexhb_write_retries_total{kind="lost"}')) == []  # declared, and rare


# ---- the dashboard --------------------------------------------------------------------------------------------------


def test_the_dashboard_is_of_grafana_10_and_asks_the_chosen_prometheus() -> None:
    assert DASHBOARD["schemaVersion"] >= 37
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["title"]
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_no_panel_lies_upon_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
