"""``pevlm tune`` on a real server with the small trained model, with answers and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accuracy.dataset import EXAMPLE, make_clip, write_questions

from pevlm_sglang.settings.config import PevlmConfig, resolve
from pevlm_sglang.tools.cli import main
from server.conftest import FEW_TOKENS
from support.server import Server

pytestmark = pytest.mark.server

MODEL = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy" / "model"
FLAGS = ("--attention-backend", "pevlm", *FEW_TOKENS)
SIZES = ["--sink-frames", "4", "--block-frames", "4", "64"]  # 64 frames are the whole video
SCENES, TASKS = 32, ("code", "time", "find")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Server(MODEL, *FLAGS) as server:
        yield server.url


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = [make_clip(EXAMPLE, SCENES, number, 1, TASKS) for number in range(3)]
    return write_questions(clips, tmp_path_factory.mktemp("clips"))


def tune(questions: Path, url: str, output: Path, *flags: str) -> dict[str, Any]:
    """Run, check the preset, and read the results."""
    where = ["--url", url, "--output", str(output), "--latency", "60"]
    assert main(["tune", str(questions), *where, *SIZES, *flags]) == 0
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    assert resolve(output / "preset.yaml", {}) == PevlmConfig().override(found["recommended"])
    return found


def test_labelled(
    url: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tune(questions, url, tmp_path)
    full, sparse, whole = found["results"]
    assert full["accuracy"]["value"] > 0.5, "guessing finds a quarter"
    assert (full["visible_fraction"], whole["visible_fraction"]) == (1, 1)
    assert 0.3 < sparse["visible_fraction"] < 0.6
    assert whole["accuracy"] == full["accuracy"]
    assert whole["logprob_difference"] < 1e-5 < sparse["logprob_difference"]
    assert found["recommended"] in ({"enabled": False}, {"sink_frames": 4, "block_frames": 4})
    assert 0 < full["ttft_median_s"] <= full["ttft_p90_s"] < 60
    out = capsys.readouterr().out
    assert "never anything but full attention, and not recommended: 4 / 64" in out
    measured = (tmp_path / "measurements.jsonl").read_text()
    assert (
        main(
            [
                "tune",
                str(questions),
                "--url",
                url,
                "--output",
                str(tmp_path),
                *SIZES,
                "--latency",
                "0.000001",
            ]
        )
        == 3
    )
    assert (tmp_path / "measurements.jsonl").read_text() == measured, "all were there"


def test_unlabelled_videos_sent_along(url: str, questions: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    unlabelled = questions.with_name("unlabelled.jsonl")
    kept = ("video", "question")
    unlabelled.write_text(
        "".join(json.dumps({name: line[name] for name in kept}) + "\n" for line in lines[:3])
    )
    found = tune(unlabelled, url, tmp_path, "--embed-videos")
    full, sparse, whole = found["results"]
    assert full["accuracy"] is None
    assert full["agreement"]["value"] == whole["agreement"]["value"] == 1
    assert sparse["logprob_difference"] > whole["logprob_difference"]
    assert sparse["sparse_prompts"] == 3
