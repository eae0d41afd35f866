"""From points to a line a setting: how often right, how fast, and how sure that is.

Questions about one video are not independent, so intervals are of a bootstrap over videos: 95 %,
10,000 draws. Differences to full attention are paired, question by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pevlm_sglang.tune.points import FULL, Point, Setting
from pevlm_sglang.tune.questions import Question
from pevlm_sglang.tune.scoring import is_right, logprob_difference

_DRAWS = 10_000


@dataclass(frozen=True)
class Share:
    """A share of the questions, with its 95 % interval; 0 to 1, a difference -1 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One setting over all questions.

    Attributes:
        setting: the setting.
        accuracy: right answers; None for an unlabelled set.
        agreement: answers that equal full attention's.
        scores: 1 or 0 a question, whose mean ``score`` is.
        difference: ``score`` minus full attention's.
        logprob_difference: mean of ``scoring.logprob_difference`` over the questions.
        ttft: seconds to the first token, of every question in turn.
        visible_fraction: pairs computed over those of full attention, all prompts together.
        sparse_prompts: prompts of which PEVLM saved a pair.
    """

    setting: Setting
    accuracy: Share | None
    agreement: Share
    scores: tuple[float, ...]
    difference: Share
    logprob_difference: float | None
    ttft: tuple[float, ...]
    visible_fraction: float
    sparse_prompts: int

    @property
    def score(self) -> Share:
        """Accuracy, or agreement where there are no right answers to compare with."""
        return self.accuracy or self.agreement

    def ttft_at(self, quantile: float) -> float:
        return float(np.quantile(self.ttft, quantile))

    def describe(self, quantile: float) -> dict[str, Any]:
        """JSON-ready."""
        shares = ("accuracy", "agreement", "difference")
        return {
            **self.setting.options,
            **{name: vars(share) if (share := getattr(self, name)) else None for name in shares},
            "logprob_difference": self.logprob_difference,
            "ttft_median_s": self.ttft_at(0.5),
            "ttft_p90_s": self.ttft_at(0.9),
            f"ttft_p{100 * quantile:g}_s": self.ttft_at(quantile),
            "visible_fraction": self.visible_fraction,
            "sparse_prompts": self.sparse_prompts,
        }


@dataclass(frozen=True)
class Evaluation:
    """All settings over the same questions.

    Attributes:
        videos: a name a question.
        results: full attention's first.
    """

    videos: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def num_videos(self) -> int:
        return len(set(self.videos))

    def compare(self, one: Result, other: Result) -> Share:
        """Score of one minus that of the other, paired."""
        return _share(self.videos, np.array(one.scores) - np.array(other.scores))


def evaluate(
    questions: Sequence[Question],
    settings: Sequence[Setting],
    done: Mapping[tuple[Setting, str], Point],
) -> Evaluation:
    """One result a setting, in their order; all points must be there."""
    videos = tuple(str(question.video) for question in questions)
    full = [done[FULL, question.key] for question in questions]
    labelled = questions[0].answer is not None

    def right(points: Sequence[Point]) -> list[bool]:
        return [
            is_right(point.answer.text, question.answer or "")
            for question, point in zip(questions, points, strict=True)
        ]

    def agrees(points: Sequence[Point]) -> list[bool]:
        pairs = zip(points, full, strict=True)
        return [point.answer.text == other.answer.text for point, other in pairs]

    score = right if labelled else agrees
    full_scores = np.array(score(full), float)
    results = []
    for setting in settings:
        points = [done[setting, question.key] for question in questions]
        scores = np.array(score(points), float)
        distances = [
            logprob_difference(other.answer.tokens, point.answer.tokens)
            for point, other in zip(points, full, strict=True)
        ]
        compared = [distance for distance in distances if distance is not None]
        computed = sum(point.work.pairs_computed for point in points)
        saved = sum(point.work.pairs_saved for point in points)
        results.append(
            Result(
                setting=setting,
                accuracy=_share(videos, scores) if labelled else None,
                agreement=_share(videos, np.array(agrees(points), float)),
                scores=tuple(scores.tolist()),
                difference=_share(videos, scores - full_scores),
                logprob_difference=float(np.mean(compared)) if compared else None,
                ttft=tuple(point.answer.ttft for point in points),
                visible_fraction=computed / (computed + saved),
                sparse_prompts=sum(point.work.pairs_saved > 0 for point in points),
            )
        )
    return Evaluation(videos, tuple(results))


def _share(videos: tuple[str, ...], values: np.ndarray) -> Share:
    """The mean of one value a question, with its interval over videos."""
    weights, places = _draws(videos)
    num_videos = weights.shape[1]
    counts = weights @ np.bincount(places, minlength=num_videos)
    sums = weights @ np.bincount(places, weights=values, minlength=num_videos)
    low, high = np.quantile(sums / counts, [0.025, 0.975])
    return Share(float(values.mean()), float(low), float(high))


@cache
def _draws(videos: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """How often each video is in each draw, ``[draws, videos]``, and each question's video.

    All values of an evaluation have the same draws.
    """
    names, places = np.unique(videos, return_inverse=True)
    chances = np.full(len(names), 1 / len(names))
    return np.random.default_rng(0).multinomial(len(names), chances, size=_DRAWS), places
