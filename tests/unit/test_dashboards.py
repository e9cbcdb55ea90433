"""The dashboards, rules and docs agree with each other and with what a node exports."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.promql import Selector, selectors

from node.metrics import NodeInfo, WorkerMetrics

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "docker" / "grafana"
PROMETHEUS = ROOT / "docker" / "prometheus"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
METRICS = WorkerMetrics(NodeInfo("run", "name", stage=1, num_stages=3, version="1", device="cpu"))
SCRAPED = {"job", "instance"}  # what Prometheus adds to every series

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load((PROMETHEUS / name).read_text()) for name in ("rules.yml", "alerts.yml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of every query, rule and variable."""
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]
        for variable in json.loads(path.read_text())["templating"]["list"]:
            yield f"{path.stem}: ${variable['name']}", variable["query"].split("(", 1)[1].rsplit(",", 1)[0]
    for rule in rules():
        yield rule.get("record") or rule["alert"], rule["expr"]


def exported() -> dict[str, set[str]]:
    """Every series that a scrape of a node can have, with its labels."""
    names = {}
    for metric in METRICS.described:
        labels = set(metric.labels)
        if metric.kind == "histogram":
            names |= {f"{metric.name}_{part}": labels for part in ("sum", "count")}
            names[f"{metric.name}_bucket"] = {*labels, "le"}
        else:
            names[metric.name] = labels
    names |= {s.name: set() for f in METRICS.registry.collect() if f.name.startswith("process_") for s in f.samples}
    return names


KNOWN = {
    **exported(),
    **{rule["record"]: None for rule in rules() if "record" in rule},  # their labels follow from their expressions
    "up": set(),
    "ALERTS": {"alertname", "alertstate"},
}


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, GRAFANA / "build.py", tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert fresh == {path.name: path.read_text() for path in DASHBOARDS}, "run `make dashboards`"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    board = json.loads(path.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in panels(path)]
    assert len(titles) == len(set(titles))
    assert [variable["name"] for variable in board["templating"]["list"]] == ["run", "stage", "instance"]
    for panel in panels(path):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters
        assert len(letters) == len(set(letters))
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert all(target["legendFormat"] for target in panel["targets"])
        assert panel["datasource"]["uid"] == "resbm-prometheus"


def test_dashboards_can_be_told_apart_and_the_first_panel_is_what_the_swarm_is_for() -> None:
    boards = {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}
    assert set(boards) == {"swarm", "node", "network"}
    assert len({board["uid"] for board in boards.values()}) == len(boards)
    assert panels(GRAFANA / "dashboards" / "swarm.json")[0]["title"] == "Throughput against bandwidth"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_no_two_panels_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(path.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_metric_and_label_used_is_exported() -> None:
    wrong = []
    for where, expr in expressions():
        for selector in selectors(expr):
            labels = KNOWN.get(selector.metric, set())
            if selector.metric not in KNOWN or (labels is not None and selector.labels - labels - SCRAPED):
                wrong.append(f"{where}: {selector}")
    assert not wrong


def test_every_rule_is_used_and_every_metric_is_shown() -> None:
    """A metric that nobody can see, or a rule that nobody asks for, is a mistake in one place or the other."""
    used = {selector.metric for _, expr in expressions() for selector in selectors(expr)}
    assert {rule["record"] for rule in rules() if "record" in rule} <= used
    shown = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in used}
    assert {metric.name for metric in METRICS.described} <= shown


def test_the_provisioned_data_source_is_the_one_that_panels_name() -> None:
    folder = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["uid"] == "resbm-prometheus"
    (provider,) = yaml.safe_load((folder / "dashboards" / "resbm-node.yml").read_text())["providers"]
    assert provider["options"]["path"]


def test_peers_of_the_lab_are_scraped() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"peer{n}:9100" for n in range(4)]
    assert set(config["rule_files"]) == {"rules.yml", "alerts.yml"}


def test_expressions_are_read_as_meant() -> None:
    expr = 'sum by (stage, le) (rate(a_b{x="y{z}", w=~"v"}[$__rate_interval])) / on (job) group_left (run) b:c'
    expr += " or 0 * d > +Inf"
    assert list(selectors(expr)) == [
        Selector("a_b", frozenset({"x", "w"})),
        Selector("b:c", frozenset()),
        Selector("d", frozenset()),
    ]


# -- promtool ---------------------------------------------------------------------------------------------------


def promtool(*arguments: str | Path, standard_input: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=standard_input,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.prometheus
@needs_promtool
def test_the_configuration_is_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.prometheus
@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", PROMETHEUS / "alerts_test.yml")


def test_every_alert_is_tested_and_explained() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    assert {case["alertname"] for test in tests for case in test.get("alert_rule_test", [])} == alerts
    docs = (ROOT / "docs" / "metrics.md").read_text()
    assert not [alert for alert in alerts if f"`{alert}`" not in docs]


@pytest.mark.prometheus
@needs_promtool
def test_what_a_node_exports_obeys_prometheus_rules() -> None:
    from prometheus_client import generate_latest

    assert not promtool("check", "metrics", standard_input=generate_latest(METRICS.registry).decode())


def test_the_table_in_the_docs_is_what_a_node_registers() -> None:
    spec = importlib.util.spec_from_file_location("metrics_table", ROOT / "docs" / "metrics_table.py")
    assert spec is not None
    assert spec.loader is not None
    metrics_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metrics_table)
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert metrics_table.with_table(page) == page, "run `make dashboards`"
    assert page.count("| `resbm_node_") == len(METRICS.described)
