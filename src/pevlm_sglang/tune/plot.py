"""Score against time to first token as a PNG; matplotlib is the optional extra ``png``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pevlm_sglang.tune.results import Limit, Result

PLOT_FILE = "plot.png"
MISSING = "matplotlib is not installed; install it with: pip install 'pevlm-sglang[png]'"

_FULL, _PEVLM, _BEST, _INK = "#12355b", "#5b93c7", "#f6b149", "#333333"


def available() -> bool:
    return find_spec("matplotlib") is not None


def draw_plot(results: Sequence[Result], best: Result | None, limit: Limit, path: Path) -> None:
    """A dot a setting, with the 95 % interval of its score; the limit is a line.

    Args:
        results: of the sweep.
        best: the recommended one, which gets a ring.
        limit: gives the quantile of the time.
        path: of the picture; its folder must exist.

    Raises:
        ValueError: matplotlib is not installed, or the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(MISSING) from None

    figure = Figure(figsize=(9, 5.6), dpi=100, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        score, time = result.score, result.ttft_at(limit.quantile)
        colour = _FULL if result.setting.is_full else _PEVLM
        # With very few videos, the interval may miss the value.
        spread = [[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]]
        axes.errorbar(
            time, score.value, spread, fmt="o", color=colour, ecolor="#cccccc", capsize=2, zorder=2
        )
        axes.annotate(
            result.setting.name,
            (time, score.value),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=9,
            color=_INK,
        )
        if result is best:
            axes.scatter(
                time,
                score.value,
                s=240,
                facecolors="none",
                edgecolors=_BEST,
                linewidths=2.5,
                label="recommended",
                zorder=3,
            )
    axes.axvline(limit.seconds, color=_INK, linestyle="--", linewidth=1, label=f"limit: {limit}")
    axes.set_xlabel(f"time to first token, {limit.quantile:g} quantile (s)")
    what = "accuracy" if results[0].accuracy else "agreement with full attention"
    axes.set_ylabel(f"{what} (bars: 95 % intervals)")
    axes.set_title("sink / block frames", fontsize=11, color=_INK)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    try:
        FigureCanvasAgg(figure).print_png(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
