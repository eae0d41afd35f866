"""From measurements to a line a setting, how often right, how fast, how sure; and which to serve.

Questions about one video are not independent, so intervals are of a bootstrap over videos: 95 %,
10,000 draws. Differences to full attention are paired, question by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from pevlm_sglang.tune.measurements import FULL, Measurement, Setting
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


@dataclass(frozen=True)
class Limit:
    """What may be waited for the first token.

    Attributes:
        seconds: the longest.
        quantile: of the questions' times that must not exceed it.
    """

    seconds: float
    quantile: float

    def holds(self, result: Result) -> bool:
        return result.ttft_at(self.quantile) <= self.seconds

    def __str__(self) -> str:
        return f"{self.seconds:g} s at the {self.quantile:g} quantile"


@dataclass(frozen=True)
class Recommendation:
    """What follows from the results.

    Attributes:
        best: within the limit the setting with the best score, of several the fastest; None where
            none is within the limit.
        nearest: the fastest of all settings.
        rivals: the other settings within the limit which these questions cannot tell from
            ``best``, the fastest first: the 95 % interval of the paired difference of their scores
            has 0 in it.
    """

    best: Result | None
    nearest: Result
    rivals: tuple[Result, ...] = ()


def evaluate(
    questions: Sequence[Question],
    settings: Sequence[Setting],
    done: Mapping[tuple[Setting, str], Measurement],
) -> Evaluation:
    """One result a setting, in their order; all measurements must be there."""
    videos = tuple(str(question.video) for question in questions)
    full = [done[FULL, question.key] for question in questions]

    def right(own: Sequence[Measurement]) -> np.ndarray:
        pairs = zip(questions, own, strict=True)
        return np.array([is_right(one.answer.text, asked.answer or "") for asked, one in pairs])

    def agrees(own: Sequence[Measurement]) -> np.ndarray:
        pairs = zip(full, own, strict=True)
        return np.array([one.answer.text == other.answer.text for other, one in pairs])

    labelled = questions[0].answer is not None
    score = right if labelled else agrees
    full_scores = score(full).astype(float)
    results = []
    for setting in settings:
        own = [done[setting, question.key] for question in questions]
        scores = score(own).astype(float)
        distances = [
            logprob_difference(other.answer.tokens, one.answer.tokens)
            for other, one in zip(full, own, strict=True)
        ]
        compared = [distance for distance in distances if distance is not None]
        computed = sum(one.work.pairs_computed for one in own)
        saved = [one.work.pairs_saved for one in own]
        results.append(
            Result(
                setting=setting,
                accuracy=_share(videos, scores) if labelled else None,
                agreement=_share(videos, agrees(own).astype(float)),
                scores=tuple(scores.tolist()),
                difference=_share(videos, scores - full_scores),
                logprob_difference=float(np.mean(compared)) if compared else None,
                ttft=tuple(one.answer.ttft for one in own),
                visible_fraction=computed / (computed + sum(saved)),
                sparse_prompts=sum(pairs > 0 for pairs in saved),
            )
        )
    return Evaluation(videos, tuple(results))


def recommend(evaluation: Evaluation, limit: Limit) -> Recommendation:
    """The rule of ``Recommendation``; settings that saved no pair are full attention by another
    name, and left out.

    Raises:
        ValueError: no setting saved a pair, so that there was nothing to choose from.
    """
    candidates = [r for r in evaluation.results if r.setting.is_full or r.sparse_prompts]
    if all(r.setting.is_full for r in candidates):
        raise ValueError(
            "no setting saved an attention pair: the sink and one block of each hold every video "
            "whole; try smaller ones, or longer videos"
        )
    by_time = sorted(candidates, key=lambda result: result.ttft_at(limit.quantile))
    within = [*filter(limit.holds, by_time)]
    if not within:
        return Recommendation(None, by_time[0])
    best = max(within, key=lambda result: result.score.value)  # the first of equals: the fastest
    compared = {other: evaluation.compare(best, other) for other in within if other is not best}
    rivals = tuple(other for other, share in compared.items() if share.low <= 0 <= share.high)
    return Recommendation(best, by_time[0], rivals)


def _share(videos: tuple[str, ...], values: np.ndarray) -> Share:
    """The mean of one value a question, with its interval over videos, of which all values of an
    evaluation have the same draws."""
    _, places = np.unique(videos, return_inverse=True)
    sums, counts = np.bincount(places, weights=values), np.bincount(places)
    value = float(values.mean())
    if len(counts) == 1:  # from which scipy draws nothing
        return Share(value, value, value)
    drawn = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        n_resamples=_DRAWS,
        batch=1000,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Share(value, float(drawn.low), float(drawn.high))
