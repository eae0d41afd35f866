"""Which setting to serve under a limit on the time to first token."""

from __future__ import annotations

from dataclasses import dataclass

from pevlm_sglang.tune.results import Evaluation, Result


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


def recommend(evaluation: Evaluation, limit: Limit) -> Recommendation:
    """The rule above; settings that saved no pair are full attention by another name, and left out.

    Raises:
        ValueError: no setting saved a pair, so that there was nothing to choose from.
    """
    candidates = [r for r in evaluation.results if r.setting.is_full or r.sparse_prompts]
    if all(r.setting.is_full for r in candidates):
        raise ValueError(
            "no setting saved an attention pair: the sink and one block of each hold every video "
            "whole; try smaller ones, or longer videos"
        )

    def time(result: Result) -> float:
        return result.ttft_at(limit.quantile)

    nearest = min(candidates, key=time)
    within = sorted(filter(limit.holds, candidates), key=time)
    if not within:
        return Recommendation(None, nearest)
    best = max(within, key=lambda result: result.score.value)  # the first of equals: the fastest
    compared = {other: evaluation.compare(best, other) for other in within if other is not best}
    rivals = tuple(other for other, share in compared.items() if share.low <= 0 <= share.high)
    return Recommendation(best, nearest, rivals)
