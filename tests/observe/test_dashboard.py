"""The metrics that are exported, those that the documents name, and those that the dashboard asks
for are the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.documents import ROOT, table

pytest.importorskip("prometheus_client")

EXPORTED = """
import json
from prometheus_client import REGISTRY
from pevlm_sglang.media.stages import _of_the_cache, _prometheus
from pevlm_sglang.observe.observer import Observer

Observer(log=False, metrics=True)
_prometheus()
_of_the_cache()
metrics = {m.name: m for m in REGISTRY.collect() if m.name.startswith("pevlm_")}
labels = {c._name: c._labelnames for c in set(REGISTRY._names_to_collectors.values())
          if getattr(c, "_name", "").startswith("pevlm_")}
print(json.dumps({name: [m.type, labels[name]] for name, m in metrics.items()}))
"""
SAMPLES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())


@cache
def exported() -> dict[str, tuple[str, list[str]]]:
    """Type and labels of each metric, as a server's processes make them."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORTED], capture_output=True, text=True, check=True
    )
    found: dict[str, tuple[str, list[str]]] = json.loads(done.stdout)
    return found


def samples() -> dict[str, list[str]]:
    """What Prometheus stores, with its labels."""
    return {
        name + end: labels for name, (kind, labels) in exported().items() for end in SAMPLES[kind]
    }


def expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:pevlm_|sglang:)\w+", text))


def test_what_is_exported_is_documented() -> None:
    """With its labels."""
    text = (ROOT / "docs" / "operations.md").read_text()
    written = {
        re.fullmatch(r"`(\w+)(?:\{(\S+)\})?`", row[0]): row
        for row in table(text, "## What you can see")
        if "pevlm_" in row[0]
    }
    documented = {m[1]: m[2].split(",") if m[2] else [] for m in written if m is not None}
    assert len(documented) == len(written)
    counters = {name: kind == "counter" for name, (kind, _) in exported().items()}
    assert documented == {
        name + "_total" * counters[name]: labels for name, (_, labels) in exported().items()
    }


def test_documents_name_nothing_else() -> None:
    known = {*samples(), *exported()}
    for path in sorted((ROOT / "docs").glob("*.md")):
        named = {n for n in names(path.read_text()) if re.search("_(total|seconds|bytes)", n)}
        assert {n for n in named if n.startswith("pevlm_")} <= known, path


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_the_dashboard_asks_for_what_there_is(title: str, expression: str) -> None:
    assert names(expression), title
    for name in names(expression):
        if name.startswith("sglang:"):
            assert name in of_sglang(), name
            continue
        assert name in samples(), name
        selectors = re.findall(name + r"\{([^}]*)\}", expression)
        used = {label for one in selectors for label in re.findall(r"(\w+)\s*=", one)}
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))
        assert used | grouped <= {*samples()[name], "instance", "le"}


@cache
def of_sglang() -> frozenset[str]:
    """What SGLang's collector exports, read from its source; histograms with their parts."""
    sglang = pytest.importorskip("sglang")
    folder = Path(sglang.__path__[0]) / "srt" / "observability"
    source = "\n".join(path.read_text() for path in folder.glob("*.py"))
    found = set()
    for kind, name in re.findall(r"(Counter|Gauge|Histogram)\(\s*name=\"(sglang:\w+)\"", source):
        ends = SAMPLES[kind.lower()] if kind == "Histogram" else [""]
        found |= {name + end for end in ends}
    return frozenset(found)


def test_the_dashboard_shows_every_metric() -> None:
    shown = set().union(*(names(expression) for _, expression in expressions()))
    missing = [name for name in exported() if not any(one.startswith(name) for one in shown)]
    assert not missing


def test_grafana_takes_the_dashboard() -> None:
    """What Grafana 10 and newer need of one: panels that do not overlap, on a chosen source."""
    assert DASHBOARD["schemaVersion"] >= 38
    assert DASHBOARD["title"]
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval"}
    assert used == variables == {"datasource", "instance"}
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["title"]
        assert panel["description"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*ids}) == len(ids)
