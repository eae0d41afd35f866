"""The statistics against what they are defined as, computed directly."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from accuracy import answers, claims
from accuracy.questions import TASKS

VIDEOS = 9


def made_up(right: dict[str, list[bool]], videos: int) -> list[dict[str, Any]]:
    """``right[method][video]`` for each task of each video."""
    return [
        {"video": v, "task": task, "right": {name: ok[v] for name, ok in right.items()}}
        for v in range(videos)
        for task in TASKS
    ]


@pytest.fixture(name="rows", scope="module")
def _rows() -> list[dict[str, Any]]:
    """Uneven: 1 to 3 questions a task and video, and methods that are right at different rates."""
    rng = np.random.default_rng(5)
    rates = {"full": 0.8, "other": 0.6}
    return [
        {"video": v, "task": task, "right": {n: bool(rng.random() < r) for n, r in rates.items()}}
        for v in range(VIDEOS)
        for task in TASKS
        for _ in range(rng.integers(1, 4))
    ]


def mean_accuracy(rows: list[dict[str, Any]], method: str) -> float:
    by_task = [[r["right"][method] for r in rows if r["task"] == task] for task in TASKS]
    return float(np.mean([np.mean(of_task) for of_task in by_task]))


def test_accuracy_is_the_mean_of_the_tasks(rows: list[dict[str, Any]]) -> None:
    found = answers.Answers.of(rows, ["full", "other"]).accuracy("other")
    assert found["accuracy"] == pytest.approx(mean_accuracy(rows, "other"), abs=1e-4)
    counts = [found["tasks"][task]["questions"] for task in TASKS]
    assert sum(counts) == len(rows)


def test_intervals_are_those_of_videos_drawn_again(rows: list[dict[str, Any]]) -> None:
    found = answers.Answers.of(rows, ["full", "other"])
    of_video = [[r for r in rows if r["video"] == v] for v in range(VIDEOS)]
    rng = np.random.default_rng(11)
    one, gap = [], []
    for _ in range(1500):
        drawn = [r for v in rng.integers(0, VIDEOS, VIDEOS) for r in of_video[v]]
        one.append(mean_accuracy(drawn, "full"))
        gap.append(one[-1] - mean_accuracy(drawn, "other"))
    expected = np.quantile(one, [0.025, 0.975])
    np.testing.assert_allclose(found.accuracy("full")["interval"], expected, atol=0.012)
    contrast = found.contrast({"full": 1, "other": -1})
    np.testing.assert_allclose(contrast["interval"], np.quantile(gap, [0.025, 0.975]), atol=0.02)


def test_the_test_flips_every_sign(rows: list[dict[str, Any]]) -> None:
    found = answers.Answers.of(rows, ["full", "other"]).contrast({"full": 1, "other": -1})
    asked = {task: sum(r["task"] == task for r in rows) for task in TASKS}
    shares = np.zeros(VIDEOS)
    for r in rows:
        shares[r["video"]] += (r["right"]["full"] - r["right"]["other"]) / asked[r["task"]]
    shares /= len(TASKS)
    assert found["difference"] == pytest.approx(shares.sum(), abs=1e-4)
    flipped = [abs(np.dot(s, shares)) for s in itertools.product([-1, 1], repeat=VIDEOS)]
    exact = np.mean(np.array(flipped) >= abs(shares.sum()) - 1e-12)
    assert found["p_value"] == pytest.approx(exact, abs=1e-4), "so few signs are all tried"


def test_a_contrast_is_linear_and_refuses_what_is_no_difference(rows: list[dict[str, Any]]) -> None:
    found = answers.Answers.of(rows, ["full", "other"])
    twice = found.contrast({"full": 2, "other": -2})
    once = found.contrast({"full": 1, "other": -1})
    assert twice["difference"] == pytest.approx(2 * once["difference"], abs=2e-4)
    assert twice["p_value"] == once["p_value"]
    with pytest.raises(ValueError, match="sum of 0"):
        found.contrast({"full": 1})
    with pytest.raises(ValueError, match="nobody"):
        found.contrast({"full": 1, "nobody": -1})


def test_summary_finds_what_differs_and_only_that() -> None:
    rng = np.random.default_rng(0)
    full = (rng.random(80) < 0.9).tolist()
    same = full[1:] + full[:1]
    worse = [ok and bool(rng.random() < 0.7) for ok in full]
    names = ["full", "same", "worse"]
    rows = made_up({"full": full, "same": same, "worse": worse}, 80)
    found = answers.summary(rows, names, "full")
    assert found["full"]["accuracy"] == pytest.approx(np.mean(full), abs=1e-4)
    assert "minus_base" not in found["full"]
    assert found["same"]["minus_base"]["p_value"] > 0.2
    against = found["worse"]["minus_base"]
    assert against["p_value"] < 0.01
    assert against["difference"] == pytest.approx(np.mean(worse) - np.mean(full), abs=1e-4)
    low, high = found["full"]["interval"]
    assert low < np.mean(full) < high


def test_ratio() -> None:
    rows = made_up({"full": [True] * 4, "half": [True, True, False, False]}, 4)
    found = answers.Answers.of(rows, ["full", "half"]).ratio("half", "full")
    assert found["ratio"] == 0.5
    assert found["interval"][0] < 0.5 < found["interval"][1]


def test_holm() -> None:
    # Worked by hand: 4 * .01, 3 * .013, 2 * .03, 1 * .2, never falling.
    assert answers.holm([0.03, 0.01, 0.2, 0.013]) == [0.06, 0.04, 0.2, 0.04]
    assert answers.holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts_follow_the_data() -> None:
    rng = np.random.default_rng(2)
    good = [True] * 60
    bad = (rng.random(60) < 0.5).tolist()
    rows = made_up({"good": good, "bad": bad, "again": good[:]}, 60)
    found = claims.tested(
        [
            claims.better("good is better", "good", "bad"),
            claims.better("bad is better", "bad", "good"),
            claims.better("as good", "again", "good"),
        ],
        answers.Answers.of(rows, ["good", "bad", "again"]),
    )
    assert [c["verdict"] for c in found] == ["reproduced", "the opposite", "not decided"]
    assert found[0]["p_holm"] == pytest.approx(3 * found[0]["p_value"], abs=1e-4)
