"""Which questions were answered right, with 95 % bootstrap intervals and paired tests over videos.

A video is the unit of everything random here: its questions share its picture, its noise and its
luck. Intervals resample videos with replacement. The test of a difference flips the sign of whole
videos' differences at random (two-sided; no assumption but that, without a difference, a video is
as likely to favour one side as the other). The accuracy of several tasks is the mean of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from accuracy.questions import TASKS
from scipy import stats

RESAMPLES = 10_000
_BATCH = 200  # of them at once, which bounds the memory
COLUMNS = ("video", "frames", "task", "question", "answer")


@dataclass(frozen=True)
class Answers:
    """Counts.

    Attributes:
        methods: names, in the order of ``right``.
        tasks: those that any question is of.
        right: ``[methods, tasks, videos]`` float64, questions answered right.
        asked: ``[tasks, videos]`` float64, questions.
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
        right = np.zeros((len(methods), len(tasks), len(number)))
        asked = np.zeros((len(tasks), len(number)))
        for row in rows:
            where = tasks.index(row["task"]), number[row["video"]]
            asked[where] += 1
            for i, method in enumerate(methods):
                right[(i, *where)] += row["right"][method]
        return cls(methods, tasks, right, asked)

    def accuracy(self, method: str) -> dict[str, Any]:
        """``accuracy`` and ``interval`` of all, and by ``tasks`` with their ``questions``."""
        row = self.methods.index(method)
        tasks, draws = _share(self.right[row], self.asked), self._draws[row]
        return {
            "accuracy": _rounded(tasks.mean()),
            "interval": interval(draws.mean(0)),
            "tasks": {
                task: {
                    "accuracy": _rounded(tasks[j]),
                    "interval": interval(draws[j]),
                    "questions": int(self.asked[j].sum()),
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
        shares = np.tensordot(factors, self.right, 1) / self.asked.sum(1, keepdims=True)
        draws = np.tensordot(factors, self._draws, 1)
        found, *by_task = _tested(*(np.vstack([rows.mean(0), rows]) for rows in (shares, draws)))
        return found | {"tasks": dict(zip(self.tasks, by_task, strict=True))}

    def ratio(self, method: str, base: str) -> dict[str, Any]:
        """``ratio`` of two accuracies, with its ``interval``."""
        rows = [self.methods.index(name) for name in (method, base)]
        one, other = _share(self.right[rows], self.asked).mean(1)
        draws = self._draws[rows].mean(1)
        return {"ratio": _rounded(one / other), "interval": interval(draws[0] / draws[1])}

    @cached_property
    def _draws(self) -> np.ndarray:
        """``[methods, tasks, RESAMPLES]`` accuracies of resampled videos; NaN is a task that none
        asks."""
        with np.errstate(invalid="ignore"):
            return resampled(_share, self.right, self.asked)


def resampled(statistic: Callable[..., np.ndarray], *values: np.ndarray) -> np.ndarray:
    """``[..., RESAMPLES]``: a statistic of videos drawn again, the same ones in every call.

    Args:
        statistic: of ``values`` and the axis that it reduces.
        values: ``[..., videos]`` each.
    """
    if values[0].shape[-1] == 1:  # of which scipy draws nothing
        return np.repeat(statistic(*values, axis=-1)[..., None], RESAMPLES, -1)
    found = stats.bootstrap(
        values,
        statistic,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        paired=True,
        axis=-1,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return np.asarray(found.bootstrap_distribution)


def sign_flip(shares: np.ndarray) -> np.ndarray:
    """The p-values ``[...]`` of sums of videos' differences, ``[..., videos]``, being 0
    (two-sided)."""
    found = stats.permutation_test(
        (shares,),
        # Rounded, so that sums which differ by the order of their terms alone are equal.
        lambda shares, axis: abs(shares.sum(axis)).round(12),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_BATCH,
        alternative="greater",
        axis=-1,
        rng=np.random.default_rng(1),
    )
    return np.asarray(found.pvalue)


def tested(shares: np.ndarray) -> dict[str, Any]:
    """``difference``, ``interval`` and ``p_value`` of a mean over videos.

    Args:
        shares: ``[videos]`` differences.
    """
    row = shares[None]
    return _tested(row / len(shares), resampled(np.mean, row))[0]


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


def _share(right: np.ndarray, asked: np.ndarray, axis: int = -1) -> np.ndarray:
    share: np.ndarray = right.sum(axis) / asked.sum(axis)
    return share


def _tested(shares: np.ndarray, draws: np.ndarray) -> list[dict[str, Any]]:
    """Of each row of ``[rows, videos]`` and ``[rows, RESAMPLES]``."""
    return [
        {"difference": _rounded(own.sum()), "interval": interval(drawn), "p_value": _rounded(p)}
        for own, drawn, p in zip(shares, draws, sign_flip(shares), strict=True)
    ]


def _rounded(x: float) -> float:
    return round(float(x), 4)
