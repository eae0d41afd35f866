"""Which questions were answered right, with 95 % bootstrap intervals and paired tests over videos.

A video is the unit of everything random here: its questions share its picture, its noise and its
luck. Intervals resample videos with replacement. The test of a difference flips the sign of whole
videos' differences at random (two-sided; no assumption but that, without a difference, a video is
as likely to favour one side as the other). The accuracy of several tasks is the mean of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from accuracy.questions import TASKS

RESAMPLES = 10_000
COLUMNS = ("video", "frames", "task", "question", "answer")


@dataclass(frozen=True)
class Answers:
    """Counts.

    Attributes:
        methods: names, in the order of ``right``.
        tasks: those that any question is of.
        right: ``[methods, videos, tasks]`` float64, questions answered right.
        asked: ``[videos, tasks]`` float64, questions.
    """

    methods: Sequence[str]
    tasks: Sequence[str]
    right: np.ndarray
    asked: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Self:
        """Args: rows: one a question: ``video``, ``task``, and ``right``, method → bool."""
        number = {video: i for i, video in enumerate(sorted({row["video"] for row in rows}))}
        tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
        right = np.zeros((len(methods), len(number), len(tasks)))
        asked = np.zeros((len(number), len(tasks)))
        for row in rows:
            where = number[row["video"]], tasks.index(row["task"])
            asked[where] += 1
            for i, method in enumerate(methods):
                right[(i, *where)] += row["right"][method]
        return cls(methods, tasks, right, asked)

    def accuracy(self, method: str) -> dict[str, Any]:
        """``accuracy`` and ``interval`` of all, and by ``tasks`` with their ``questions``."""
        right = self.right[self.methods.index(method)]
        tasks = right.sum(0) / self.asked.sum(0)
        by_draw = self._by_draw(method)
        return {
            "accuracy": _rounded(tasks.mean()),
            "interval": interval(by_draw.mean(1)),
            "tasks": {
                task: {
                    "accuracy": _rounded(tasks[j]),
                    "interval": interval(by_draw[:, j]),
                    "questions": int(self.asked[:, j].sum()),
                }
                for j, task in enumerate(self.tasks)
            },
        }

    def contrast(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """A weighted sum of accuracies, ``{"pevlm": 1, "full": -1}`` for a difference.

        Returns:
            ``difference``, ``interval``, ``p_value``, and ``tasks``, the same by task.

        Raises:
            ValueError: weights that do not add up to 0, as a difference has to, or of a method
                that is not there.
        """
        if unknown := set(weights) - set(self.methods):
            raise ValueError(f"weights: expected methods of {self.methods}, got {sorted(unknown)}")
        if abs(sum(weights.values())) > 1e-9:
            raise ValueError(f"weights: expected a sum of 0, got {dict(weights)}")
        # A video's share in each task's accuracy, so that its sign can be flipped as a whole.
        factors = np.array([weights.get(method, 0.0) for method in self.methods])
        shares = np.tensordot(factors, self.right, 1) / self.asked.sum(0)
        by_draw = np.sum([w * self._by_draw(method) for method, w in weights.items()], axis=0)
        found = _tested(shares.mean(1), by_draw.mean(1))
        found["tasks"] = {
            task: _tested(shares[:, j], by_draw[:, j]) for j, task in enumerate(self.tasks)
        }
        return found

    def ratio(self, method: str, base: str) -> dict[str, Any]:
        """``ratio`` of two accuracies, with its ``interval``."""
        one, other = (
            (self.right[self.methods.index(m)].sum(0) / self.asked.sum(0)).mean()
            for m in (method, base)
        )
        draws = self._by_draw(method).mean(1) / self._by_draw(base).mean(1)
        return {"ratio": _rounded(one / other), "interval": interval(draws)}

    def _by_draw(self, method: str) -> np.ndarray:
        """``[RESAMPLES, tasks]`` accuracies of resampled videos; NaN is a task that none asks."""
        draws = resamples(len(self.asked))
        with np.errstate(invalid="ignore"):
            found: np.ndarray = (draws @ self.right[self.methods.index(method)]) / (
                draws @ self.asked
            )
        return found


@lru_cache(1)
def resamples(videos: int) -> np.ndarray:
    """``[RESAMPLES, videos]`` float64: how often each video is drawn; the same in every call."""
    rng = np.random.default_rng(0)
    return rng.multinomial(videos, [1 / videos] * videos, RESAMPLES).astype(np.float64)


@lru_cache(1)
def _signs(videos: int) -> np.ndarray:
    return np.random.default_rng(1).choice([-1.0, 1.0], (RESAMPLES, videos))


def sign_flip(shares: np.ndarray) -> float:
    """The p-value of a sum of videos' differences, ``[videos]``, being 0 (two-sided)."""
    extreme = abs(_signs(len(shares)) @ shares) >= abs(shares.sum()) - 1e-12
    return float((extreme.sum() + 1) / (RESAMPLES + 1))


def tested(shares: np.ndarray) -> dict[str, Any]:
    """``difference``, ``interval`` and ``p_value`` of a mean over videos.

    Args:
        shares: ``[videos]`` differences.
    """
    return _tested(shares / len(shares), resamples(len(shares)) @ shares / len(shares))


def interval(draws: np.ndarray) -> list[float]:
    """Of 95 %."""
    return [_rounded(x) for x in np.nanquantile(draws, [0.025, 0.975])]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for all of them being tested together (Holm, 1979)."""
    order = np.argsort(p_values)
    adjusted = np.zeros(len(p_values))
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return [_rounded(p) for p in adjusted]


def summary(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[str], base: str
) -> dict[str, dict[str, Any]]:
    """Method → its accuracy (``Answers.accuracy``), with ``minus_base`` (``Answers.contrast``),
    which ``base`` itself has not."""
    answers = Answers.of(rows, methods)
    found = {method: answers.accuracy(method) for method in methods}
    for method in methods:
        if method != base:
            found[method]["minus_base"] = answers.contrast({method: 1, base: -1})
    return found


def write(
    path: Path,
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
) -> None:
    """A result and its questions as indented JSON, but for a line a question, whose last entry has
    a 1 for each of ``methods`` that answered it right."""
    lines = [
        [*(row[name] for name in COLUMNS), "".join(str(int(row["right"][m])) for m in methods)]
        for row in rows
    ]
    head = json.dumps({**result, "methods": [*methods], "columns": [*COLUMNS, "right"]}, indent=1)
    body = ",\n  ".join(json.dumps(line) for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "questions": [\n  {body}\n ]\n}}\n')


def _tested(shares: np.ndarray, by_draw: np.ndarray) -> dict[str, Any]:
    return {
        "difference": _rounded(shares.sum()),
        "interval": interval(by_draw),
        "p_value": _rounded(sign_flip(shares)),
    }


def _rounded(x: float) -> float:
    return round(float(x), 4)
