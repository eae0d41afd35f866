"""What the sweep found, as text."""

from __future__ import annotations

from collections.abc import Sequence

from pevlm_sglang.tune.points import FULL
from pevlm_sglang.tune.recommend import Limit, Recommendation
from pevlm_sglang.tune.results import Evaluation, Result, Share

_FEW_VIDEOS = 10  # below which a bootstrap over videos makes intervals that are too narrow


def table(evaluation: Evaluation, limit: Limit) -> str:
    """A line a setting, below a line of names."""
    labelled = evaluation.results[0].accuracy is not None
    names = ["sink / block"]
    names += ["accuracy (95 %)", "minus full (95 %)"] if labelled else []
    names += ["agreement"] if labelled else ["agreement (95 %)"]
    quantiles = sorted({0.5, 0.9, limit.quantile})
    names += ["log-prob diff.", "visible_fraction", *(f"TTFT p{100 * q:g}" for q in quantiles)]
    rows = [names, *(_row(result, quantiles) for result in evaluation.results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join(lines)


def verdict(limit: Limit, recommendation: Recommendation) -> str:
    """The recommendation in one line."""
    best = recommendation.best
    if best is None:
        nearest = recommendation.nearest
        return (
            f"no setting is within {limit}; the nearest is {nearest.setting.in_words}: "
            f"{nearest.ttft_at(limit.quantile):.3g} s"
        )
    what = "accuracy" if best.accuracy else "agreement"
    return (
        f"recommended within {limit}: {best.setting.in_words}; {what} "
        f"{_share(best.score)}, {best.ttft_at(limit.quantile):.3g} s"
    )


def warnings(evaluation: Evaluation, recommendation: Recommendation) -> list[str]:
    """Why not to trust it too far, a line each."""
    found = []
    num_questions = len(evaluation.videos)
    whole = "the sink and one block held the whole video"
    sparse = [result for result in evaluation.results if not result.setting.is_full]
    if never := [result.setting.name for result in sparse if not result.sparse_prompts]:
        found.append(
            f"never anything but full attention, and not recommended: {', '.join(never)} ({whole})"
        )
    if some := [
        f"{result.setting.name} for {num_questions - result.sparse_prompts}"
        for result in sparse
        if 0 < result.sparse_prompts < num_questions
    ]:
        found.append(f"full attention, of {num_questions} prompts: {', '.join(some)} ({whole})")
    if evaluation.num_videos < _FEW_VIDEOS:
        found.append(
            f"few videos ({evaluation.num_videos}): intervals are over videos, and too narrow with "
            f"fewer than {_FEW_VIDEOS}"
        )
    if recommendation.best and (rivals := recommendation.rivals):
        names = ", ".join(rival.setting.name for rival in rivals)
        found.append(
            f"{num_questions} questions cannot tell {recommendation.best.setting.name} from "
            f"{names} (the fastest first); where no answer differed, up to "
            f"{min(1.0, 3 / num_questions):.0%} still may. More questions would tell"
        )
    return found


def _row(result: Result, quantiles: Sequence[float]) -> list[str]:
    distance = result.logprob_difference
    baseline = result.setting == FULL
    cells = [result.setting.name]
    if result.accuracy:
        cells += [_share(result.accuracy), "" if baseline else _points(result.difference)]
        cells += ["" if baseline else f"{result.agreement.value:.1%}"]
    else:
        cells += ["" if baseline else _share(result.agreement)]
    cells += ["" if baseline or distance is None else f"{distance:.4f}"]
    cells.append(f"{result.visible_fraction:.3f}")
    return [*cells, *(f"{result.ttft_at(quantile):.3f} s" for quantile in quantiles)]


def _share(share: Share) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _points(share: Share) -> str:
    low, high = (f"{100 * value:+.1f}" for value in (share.low, share.high))
    return f"{100 * share.value:+.1f} ({low} to {high})"
