"""From measurements to a line a setting, how often right, how fast, how sure; and which to serve.

Questions about one video are not independent, so intervals are of a bootstrap over videos: 95 %,
10,000 draws. Differences to full attention are paired, question by question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from pevlm_sglang.tune.client import Token
from pevlm_sglang.tune.measurements import Measurement, Setting
from pevlm_sglang.tune.questions import Question

_DRAWS = 10_000
_LEAD = re.compile(r"(?:the )?(?:correct |best )?(?:answer|option)(?: is)?[ :]+")
_OPTION = re.compile(r"\(([a-z])\)\s*(.*)|([a-z])(?:[).:]\s*(.*)|$)")
_MARKS = "*_`'\" "
_STRIPPED = _MARKS + ".,;:!?()[]{}"  # no sign, so that -5 is not 5


@dataclass(frozen=True)
class Share:
    """A share of the questions, with its 95 % interval; 0 to 1, a difference -1 to 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Result:
    """One setting over all questions.

    Attributes:
        accuracy: right answers; None for an unlabelled set.
        agreement: answers that equal full attention's.
        scores: 1 or 0 a question, whose mean ``score`` is.
        difference: ``score`` minus full attention's.
        logprob_difference: its mean over the questions; None where no answer has tokens.
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
        values = asdict(self)
        for name in ("setting", "scores", "ttft"):
            del values[name]
        for name, at in (("median", 0.5), ("p90", 0.9), (f"p{100 * quantile:g}", quantile)):
            values[f"ttft_{name}_s"] = self.ttft_at(at)
        return {**self.setting.options, **values}


@dataclass(frozen=True)
class Evaluation:
    """All settings over the same questions: a video's name a question, full attention's first."""

    videos: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def num_videos(self) -> int:
        return len(set(self.videos))


@dataclass(frozen=True)
class Limit:
    """What may be waited for the first token: seconds, at a quantile of the questions' times."""

    seconds: float
    quantile: float

    def __str__(self) -> str:
        return f"{self.seconds:g} s at the {self.quantile:g} quantile"


@dataclass(frozen=True)
class Recommendation:
    """What follows from the results.

    Attributes:
        best: within the limit the setting with the best score, of several the fastest, if any is.
        nearest: the fastest of all settings.
        rivals: other settings within the limit, the fastest first, which these questions cannot
            tell from ``best``: the 95 % interval of the paired difference of scores has 0 in it.
    """

    best: Result | None
    nearest: Result
    rivals: tuple[Result, ...] = ()


def evaluate(
    questions: Sequence[Question],
    settings: Sequence[Setting],
    done: Mapping[tuple[Setting, str], Measurement],
) -> Evaluation:
    """One result a setting, in their order, of which full attention is the first."""
    videos = tuple(str(question.video) for question in questions)
    full = [done[settings[0], question.key].answer for question in questions]
    labels = [question.answer for question in questions if question.answer is not None]
    results: list[Result] = []
    for setting in settings:
        own = [done[setting, question.key] for question in questions]
        answers, work = [one.answer for one in own], [one.work for one in own]
        pairs = [*zip(answers, full, strict=True)]
        agrees = scores = np.array([a.text == b.text for a, b in pairs], float)
        if labels:
            right = map(is_right, (answer.text for answer in answers), labels)
            scores = np.array([*right], float)
        found = [logprob_difference(b.tokens, a.tokens) for a, b in pairs]
        distances = [distance for distance in found if distance is not None]
        computed = sum(one.pairs_computed for one in work)
        saved = [one.pairs_saved for one in work]
        results.append(
            Result(
                setting=setting,
                accuracy=_share(videos, scores) if labels else None,
                agreement=_share(videos, agrees),
                scores=tuple(scores.tolist()),
                difference=_share(videos, scores - (results[0].scores if results else scores)),
                logprob_difference=float(np.mean(distances)) if distances else None,
                ttft=tuple(one.ttft for one in answers),
                visible_fraction=computed / (computed + sum(saved)),
                sparse_prompts=sum(map(bool, saved)),
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
    within = [result for result in by_time if result.ttft_at(limit.quantile) <= limit.seconds]
    if not within:
        return Recommendation(None, by_time[0])
    best = max(within, key=lambda result: result.score.value)  # the first of equals: the fastest

    def is_rival(other: Result) -> bool:
        share = _share(evaluation.videos, np.subtract(best.scores, other.scores))
        return other is not best and share.low <= 0 <= share.high

    return Recommendation(best, by_time[0], tuple(filter(is_rival, within)))


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


# --- Is an answer right, and how far is it from full attention's? ---------------------------------


def is_right(given: str, expected: str) -> bool:
    """Normalised exact match.

    Equal but for case, white space, and punctuation at either end. Where the expected answer is an
    option of a multiple choice, ``B``, ``(B)``, ``B.`` or ``B. two cars``, an answer is right too
    if it begins with the same option in one of these forms, also after ``Answer:`` or ``The answer
    is``, or if it is the option's text.
    """
    if _normal(given) == _normal(expected):
        return True
    (option, text), (given_option, _) = _option(expected), _option(given)
    if option and given_option:
        return given_option == option
    return bool(text) and _normal(given) == _normal(text)


def logprob_difference(full: Sequence[Token], other: Sequence[Token]) -> float | None:
    """Mean absolute difference of the log-probs, as natural logarithms, of full attention's
    answer's tokens; None where either answer is empty.

    Compared are the tokens before the first at which the answers differ, and that one, which the
    other answer's ``top`` may hold; if not, the least of ``top`` stands in for it, and the
    difference is too small rather than too large. What follows has another context in each answer,
    and is left out.
    """
    differences = []
    for token, beside in zip(full, other, strict=False):
        if token.text == beside.text:
            differences.append(abs(token.logprob - beside.logprob))
            continue
        there = beside.top.get(token.text, min(beside.top.values(), default=beside.logprob))
        differences.append(abs(token.logprob - there))
        break
    return sum(differences) / len(differences) if differences else None


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())


def _normal(text: str) -> str:
    return _spaced(text).strip(_STRIPPED) or _spaced(text)


def _option(text: str) -> tuple[str, str]:
    """The letter of an option, if the text begins with one, and what follows it."""
    spaced = _spaced(text).strip(_MARKS)
    lead = _LEAD.match(spaced)
    match = _OPTION.match(spaced, lead.end() if lead else 0)
    bracketed, bracketed_text, bare, bare_text = match.groups("") if match else [""] * 4
    return bracketed or bare, bracketed_text or bare_text
