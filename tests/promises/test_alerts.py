"""Every alert fires, clears, links to a section of the runbook, and uses metrics that a daemon exports. So does every
panel of the dashboards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import yaml

from nexhb.devices import tokens
from tests.conftest import ADMIN_KEY, Nexhb, example
from tests.support.rules import ALERTS, FOLDER, RULES, declared, needs_promtool, promtool
from tests.support.runbook import anchors
from tests.support.scrape import Scrape, scrape

HOUSE = Path(__file__).parents[2]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
TEST_FILES = sorted(FOLDER.glob("*.test.yml"))
TESTS: list[dict[str, Any]] = [test for file in TEST_FILES for test in yaml.safe_load(file.read_text())["tests"]]
DASHBOARDS: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text()) for file in sorted((HOUSE / "packaging" / "grafana").glob("*.json"))
}
PANELS = [panel for board in DASHBOARDS.values() for panel in board["panels"] if panel["type"] != "row"]
every_dashboard = pytest.mark.parametrize("name", DASHBOARDS)


# ---- the rules ------------------------------------------------------------------------------------------------------


@needs_promtool
def test_prometheus_accepts_the_rules_and_the_scrape_configuration(tmp_path: Path) -> None:
    promtool("check", "rules", "--lint-fatal", FOLDER / "nexhb.rules.yml")
    example_of = (FOLDER / "prometheus.example.yml").read_text()
    key = tmp_path / "nexhb_admin_key"
    key.write_text("a key")
    shutil.copy(FOLDER / "nexhb.rules.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(example_of.replace("/etc/prometheus/nexhb_admin_key", str(key)))
    promtool("check", "config", tmp_path / "prometheus.yml")


@needs_promtool
def test_each_alert_fires_with_its_text_and_clears() -> None:
    promtool("test", "rules", *TEST_FILES)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_test_in_which_it_fires_and_clears(name: str) -> None:
    checks = [check for test in TESTS for check in test["alert_rule_test"] if check["alertname"] == name]
    assert any(check["exp_alerts"] for check in checks), "in no test does the alert fire"
    for test in TESTS:
        mine = [check for check in test["alert_rule_test"] if check["alertname"] == name]
        assert not mine or mine[-1]["exp_alerts"] == [], f"{test['name']}: the alert never clears"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_severity_a_description_and_a_section_of_the_runbook(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    said = rule["annotations"]
    assert set(said) == {"summary", "description", "runbook_url"}
    path, _, anchor = said["runbook_url"].partition("#")
    assert anchor == name.lower()
    assert anchor in anchors((HOUSE / path).read_text())


def test_a_recorded_rule_is_used_at_least_twice() -> None:
    wanting = [rule["expr"] for rule in RULES] + [target["expr"] for panel in PANELS for target in panel["targets"]]
    for name in RECORDED:
        assert sum(name in expr for expr in wanting) >= 2, name


def test_the_scrape_has_the_job_name_that_the_alerts_use() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.example.yml").read_text())["scrape_configs"]
    assert f'up{{job="{job["job_name"]}"}}' in ALERTS["NexhbDown"]["expr"]


# ---- what is exported -----------------------------------------------------------------------------------------------

# Metrics that Prometheus itself exports.
OF_PROMETHEUS = {
    "up": {"instance", "job"},
    "ALERTS": {"alertname", "alertstate", "severity"},
} | {name: set[str]() for name in RECORDED}


class Selector(NamedTuple):
    """A metric in an expression."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, =, =~, != or !~, value
    grouped: frozenset[str]  # the labels that the expression groups by


_WORDS = frozenset(("by", "without", "on", "ignoring", "and", "or", "unless", "bool"))
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(\s*\()?")


def selectors(expr: str) -> Iterator[Selector]:
    """Yield the selectors of a PromQL expression: names other than functions and keywords."""
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


def as_scraped(labels: dict[str, str]) -> dict[str, str]:
    """Return the labels as Prometheus stores them: Prometheus adds its own labels, and renames labels of nexhb that
    conflict with these."""
    ours = {f"exported_{name}" if name in ("job", "instance") else name: value for name, value in labels.items()}
    return ours | {"job": "nexhb", "instance": "127.0.0.1:8080"}


class Exports:
    """The metrics of a daemon as Prometheus stores them."""

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
        """Yield metrics and labels in an expression that no daemon exports."""
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
        """Yield label values that no sample has, if there are samples. A test cannot produce every status."""
        samples = self._samples.get(selector.name, [])
        for name, how, value in selector.matchers:
            wanted = re.compile(value if how == "=~" else re.escape(value))
            found = any(wanted.fullmatch(sample.get(name, "")) for sample in samples)
            if samples and not found and name != "status" and "$" not in value:
                yield f"no sample of {selector.name} has {name}{how}{value}"


@pytest.fixture
async def exports(nexhb: Nexhb, now: datetime) -> Exports:
    """Return the metrics of a daemon on which everything has happened that the expressions count."""
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    assert (await agent.post(orjson.dumps(example(now, network={"ip": "x"})))).status == 200
    assert (await agent.post(b"{")).status == 400
    assert (await agent.post(b"[]", "/v1/heartbeats")).status == 200
    agent.token = tokens.new_token()
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


async def test_a_name_label_or_value_that_is_not_exported_is_detected(exports: Exports) -> None:
    assert list(exports.lacking("rate(hb_written_total[5m]) > 0")) == ["hb_written_total is not exported"]
    assert "nexhb_ready has no label host" in exports.lacking('nexhb_ready{host="a"} == 0')
    assert list(exports.lacking("sum by (kind) (nexhb_ready)")) == ["nothing has the label kind"]
    assert list(exports.lacking('nexhb_partitions{state="failed"} > 0')) == [
        "no sample of nexhb_partitions has state=failed"
    ]
    assert list(exports.lacking('nexhb_job_duration_seconds{job="nightly"}')) == [
        "no sample of nexhb_job_duration_seconds has job=nightly"
    ]
    assert list(exports.lacking('nexhb_write_retries_total{kind="lost"}')) == []  # declared, but too rare for a sample


# ---- the dashboards -------------------------------------------------------------------------------------------------


@every_dashboard
def test_a_dashboard_is_for_grafana_10_and_uses_the_selected_prometheus(name: str) -> None:
    board = DASHBOARDS[name]
    assert board["schemaVersion"] >= 37
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["title"]
            for queried in (panel, *panel["targets"]):
                assert queried["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_dashboards_can_be_imported_side_by_side() -> None:
    for key in ("uid", "title"):
        assert len({board[key] for board in DASHBOARDS.values()}) == len(DASHBOARDS) == 2


@every_dashboard
def test_no_panel_overlaps_another(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARDS[name]["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
