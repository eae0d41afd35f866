"""Markdown and PNG from small results of made-up answers, and the latency harness's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accuracy import answers, attention_scores, claims, evaluate, figures, latency, sweep, tables
from accuracy.dataset import EXAMPLE, make_clip
from accuracy.methods import Prompt
from accuracy.questions import TASKS

WEIGHTS = "0123456789abcdef"
CARD = {
    "weights_sha256": WEIGHTS,
    "torch": "2",
    "transformers": "5",
    "videos": 12,
    "questions": 12 * len(TASKS),
}


def answered(rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A question a task of 6 videos of each length; methods that are right at these rates."""
    rng = np.random.default_rng(3)
    luck = rng.random((12, len(TASKS)))
    return [
        {
            "video": v,
            "frames": (64, 96)[v % 2],
            "task": task,
            "right": {name: bool(luck[v, t] < rate) for name, rate in rates.items()},
        }
        for v in range(12)
        for t, task in enumerate(TASKS)
    ]


def held_out(pevlm: float = 0.9) -> dict[str, Any]:
    rates = dict.fromkeys(evaluate.all_methods(), 0.4) | {"full": 0.9, "pevlm": pevlm}
    rows = answered(rates)
    found = answers.Answers.of(rows, [*rates])
    return {
        "card": CARD,
        "summary": evaluate.by_length(rows, [*rates]),
        "pevlm_over_full": found.ratio("pevlm", "full"),
        "claims": claims.tested(evaluate.CLAIMS, found),
    }


def sizes() -> dict[str, Any]:
    rates = {name: 0.3 + 0.02 * i for i, name in enumerate(sweep.settings())}
    rows = answered(rates)
    fractions = dict.fromkeys(rates, 0.5)
    return {
        "card": CARD,
        "sinks": sweep.SINKS,
        "blocks": sweep.BLOCKS,
        "sink": sweep.SINK,
        "block": sweep.BLOCK,
        "block_tokens": [sweep.tokens_of(block) for block in sweep.BLOCKS],
        "summary": evaluate.by_length(rows, [*rates]),
        "visible_fraction": {"64": fractions, "96": fractions},
        "claims": claims.tested(sweep.claims(), answers.Answers.of(rows, [*rates])),
    }


def asked_server(seconds: Mapping[str, float], videos: int = 10) -> list[dict[str, Any]]:
    """A question a task; all right, each setting a bit slower from video to video."""
    return [
        {
            "video": v,
            "task": task,
            "question": f"{task}?",
            "setting": name,
            "latency_s": round(latency_s + 0.01 * v, 4),
            "ttft_s": latency_s,
            "prompt_tokens": 150 + v,
            "visible_fraction": 1.0 if name == "full" else 0.5,
            "right": True,
        }
        for v in range(videos)
        for task in TASKS
        for name, latency_s in seconds.items()
    ]


def server(seconds: Mapping[str, float]) -> dict[str, Any]:
    rows = asked_server(seconds)
    return {
        "card": CARD,
        "settings": latency.SETTINGS,
        "workloads": dict.fromkeys(latency.WORKLOADS, latency.result(rows)),
        "columns": ["workload", *rows[0]],
        "answers": [[name, *row.values()] for name in latency.WORKLOADS for row in rows],
    }


def attention() -> dict[str, Any]:
    start, steps, behind = 5, 24, 3
    ranges = [(start + 4 * i, start + 4 * (i + 1)) for i in range(steps)]
    length = ranges[-1][1] + behind
    import torch

    parts = attention_scores.parts(Prompt(ranges, torch.zeros(3, length, dtype=torch.int64)))
    rng = np.random.default_rng(4)
    found = {}
    for i, name in enumerate(attention_scores.METHODS):
        values = rng.random((6, length)) + 0.1
        found[name] = {
            "distributions": values / values.sum(1, keepdims=True),
            "distances": np.full(6, [0.0, 0.6, 0.1][i]),
        }
    return {
        "card": CARD,
        "moving_average_tokens": 16,
        "parts": parts,
        "block_tokens": 32,
        "queries": {k: attention_scores.report(found, parts) for k in attention_scores.QUERIES},
    }


@pytest.fixture(name="results", scope="module")
def _results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    for name, result in (
        ("held_out", held_out()),
        ("sweep", sizes()),
        ("latency", server({"full": 0.2, "sys+2f": 0.15, "sys+16f": 0.16})),
        ("attention_scores", attention()),
    ):
        (directory / f"{name}.json").write_text(json.dumps(result))
    return directory


@pytest.fixture(name="drawn", scope="module")
def _drawn(results: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return figures.draw(tables.read(results), tmp_path_factory.mktemp("figures"))


def test_the_document_has_every_table(results: Path, drawn: list[Path]) -> None:
    text = tables.document(tables.read(results))
    for names in (tables.MAIN, tables.ABLATION, tables.REUSE, tables.SCORED):
        assert all(f"| {name} |" in text for name in names.values())
    for number in range(1, 5):
        assert f"(Table {number})" in text
    assert WEIGHTS[:12] in text
    images = {line.split("(")[1][:-1] for line in text.splitlines() if line.startswith("![")}
    assert images == {path.name for path in drawn}


def test_sentences_follow_the_numbers() -> None:
    good, bad = held_out(pevlm=0.9), held_out(pevlm=0.2)
    above_ape = [
        next(line for line in tables.claims(found["claims"]).splitlines() if "above APE" in line)
        for found in (good, bad)
    ]
    assert "**reproduced**" in above_ape[0]
    assert "**the opposite**" in above_ape[1]
    assert "lies above the lower end" in tables.ratio(good["pevlm_over_full"])
    assert "lies below the lower end" in tables.ratio(bad["pevlm_over_full"])
    said = [dict(claim, verdict="reproduced", otherwise="why") for claim in good["claims"]]
    assert "why" not in tables.claims(said)
    assert tables.claims([said[0], dict(said[1], verdict="not decided")]).count("why") == 1


def test_results_of_different_weights_are_refused(results: Path, tmp_path: Path) -> None:
    for name in tables.FILES:
        (tmp_path / f"{name}.json").write_text((results / f"{name}.json").read_text())
    old = json.loads((tmp_path / "sweep.json").read_text())
    old["card"]["weights_sha256"] = "fedcba9876543210"
    (tmp_path / "sweep.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="fedcba987654"):
        tables.read(tmp_path)
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(ValueError, match=r"sweep\.json: expected a result, got no file"):
        tables.read(tmp_path)


def test_figures_are_small_pictures(drawn: list[Path]) -> None:
    from PIL import Image

    for path in drawn:
        assert path.stat().st_size < 150_000
        with Image.open(path) as image:
            colours = image.convert("RGB").getcolors(1 << 20)
        assert colours
        assert len(colours) > 10, path


def test_moving_average() -> None:
    found = figures.moving_average(np.array([1.0, 2.0, 6.0, 3.0, 3.0]), 3)
    np.testing.assert_allclose(found, [1.5, 3, 11 / 3, 4, 3])


def test_late_answers_are_wrong() -> None:
    found = latency.result(asked_server({"full": 0.2, "sys+2f": 0.1, "sys+16f": 0.25}))
    # Ten videos, 0.2 to 0.29 s: quantiles by interpolation.
    assert found["limits_s"] == {"90%": 0.281, "50%": 0.245, "10%": 0.209}
    accuracy = {
        limit: [by_setting[name]["accuracy"] for name in latency.SETTINGS]
        for limit, by_setting in found["accuracy"].items()
    }
    assert accuracy["none"] == [1, 1, 1]
    assert accuracy["90%"] == [0.9, 1, 0.4]
    assert accuracy["50%"] == [0.5, 1, 0]
    assert accuracy["10%"] == [0.1, 1, 0]
    assert found["times"]["sys+16f"]["minus_full"]["difference"] == pytest.approx(0.05)
    assert found["times"]["full"]["median_s"] == pytest.approx(0.245)
    verdicts = [claim["verdict"] for claim in found["claims"] if "209 ms" in claim["says"]]
    assert verdicts[0] == "reproduced"


@dataclass
class FakeAnswer:
    text: str
    ttft: float = 0.1
    prompt_tokens: int = 40
    finish_reason: str = "stop"


@dataclass
class FakeCounters:
    pairs_computed: int
    pairs_saved: int


class FakeClient:
    """A server that answers everything with ``red`` and saves pairs as told."""

    def __init__(self, saves: Mapping[bool, int]) -> None:
        self.saves = saves
        self.total = FakeCounters(0, 0)
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1

    def counters(self) -> FakeCounters:
        return FakeCounters(self.total.pairs_computed, self.total.pairs_saved)

    def ask(self, video: Path, question: str, *, setting: Any, max_tokens: int) -> FakeAnswer:
        saved = self.saves[setting["enabled"]]
        self.total.pairs_saved += saved
        self.total.pairs_computed += 820 - saved
        return FakeAnswer("red")


def test_each_question_is_asked_on_empty_caches_under_every_setting() -> None:
    clip = make_clip(EXAMPLE, 8, 0, 1)
    client: Any = FakeClient({True: 20, False: 0})
    rows = latency.ask(client, clip, Path("video.mp4"), 0, seed=0)
    assert len(rows) == client.flushes == len(clip.questions) * len(latency.SETTINGS)
    for question in clip.questions:
        own = [row for row in rows if row["question"] == question.text]
        assert {row["setting"] for row in own} == {*latency.SETTINGS}
        assert all(row["right"] == (question.answer == "red") for row in own)
    assert {row["visible_fraction"] for row in rows if row["setting"] == "full"} == {1.0}


@pytest.mark.parametrize("saves", [{True: 0, False: 0}, {True: 20, False: 20}])
def test_a_setting_that_did_not_take_effect_is_an_error(saves: dict[bool, int]) -> None:
    client: Any = FakeClient(saves)
    with pytest.raises(RuntimeError, match="saved if and only if PEVLM is on"):
        latency.ask(client, make_clip(EXAMPLE, 8, 0, 1), Path("video.mp4"), 0, seed=0)
