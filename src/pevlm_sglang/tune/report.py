"""What the sweep found: as text, as a picture, and as a preset that says where it comes from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pevlm_sglang.settings.config import PevlmConfig, resolve
from pevlm_sglang.tools import picture
from pevlm_sglang.tune.measurements import Setting
from pevlm_sglang.tune.results import Evaluation, Limit, Recommendation, Result, recommend

_FEW_VIDEOS = 10  # below which a bootstrap over videos makes intervals that are too narrow
_PRECEDENCE = (
    "Precedence: defaults < this file < --pevlm-... flags < "
    'a request\'s custom_params={"pevlm": {...}}.'
)
_FULL, _PEVLM, _BEST = "#12355b", "#5b93c7", "#f6b149"


def write_report(
    evaluation: Evaluation, limit: Limit, output: Path, *, command: str, server: Mapping[str, Any]
) -> Recommendation:
    """Print what was found, and write ``results.json``, ``plot.png`` and ``preset.yaml``.

    Args:
        output: folder; what stands there of another limit goes.
        command: that measured it.
        server: ``measurements.describe_server``.

    Raises:
        ValueError: nothing to choose from; a file cannot be written.
    """
    content, plot, preset = (output / name for name in ("results.json", "plot.png", "preset.yaml"))
    for earlier in (content, plot, preset):
        earlier.unlink(missing_ok=True)
    figures = table(evaluation, limit)
    print(f"\n{figures}\n")
    found = recommend(evaluation, limit)
    said = warnings(evaluation, found)
    described = {
        "command": command,
        "server": server,
        "limit": vars(limit),
        "questions": len(evaluation.videos),
        "videos": evaluation.num_videos,
        "results": [result.describe(limit.quantile) for result in evaluation.results],
        "recommended": found.best.setting.options if found.best else None,
        "nearest": found.nearest.setting.options,
        "indistinguishable": [rival.setting.options for rival in found.rivals],
        "warnings": said,
    }
    content.write_text(json.dumps(described, indent=2) + "\n")
    if picture.available():
        _draw(evaluation.results, found.best, limit, plot)
        print(f"plot: {plot}")
    else:
        print(f"no plot: {picture.MISSING}")
    said = [f"warning: {warning}" for warning in said]
    print("\n".join([*said, verdict(limit, found)]))
    if found.best:
        text = "\n".join([figures, "", verdict(limit, found), *said])
        _write_preset(preset, found.best.setting, command=command, figures=text, server=server)
        print(f"preset: {preset}")
    return found


def table(evaluation: Evaluation, limit: Limit) -> str:
    """A line a setting, below a line of names."""
    cells = [_cells(result, sorted({0.5, 0.9, limit.quantile})) for result in evaluation.results]
    rows = [[*cells[0]], *([*row.values()] for row in cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _cells(result: Result, quantiles: Sequence[float]) -> dict[str, str]:
    """Column → cell; what is compared with full attention is empty in its own line."""
    full, distance, minus = result.setting.is_full, result.logprob_difference, result.difference
    cells = {"sink / block": result.setting.name}
    if result.accuracy:
        value, low, high = (f"{100 * part:+.1f}" for part in (minus.value, minus.low, minus.high))
        cells["accuracy (95 %)"] = str(result.accuracy)
        cells["minus full (95 %)"] = "" if full else f"{value} ({low} to {high})"
        cells["agreement"] = "" if full else f"{result.agreement.value:.1%}"
    else:
        cells["agreement (95 %)"] = "" if full else str(result.agreement)
    cells["log-prob diff."] = "" if full or distance is None else f"{distance:.4f}"
    cells["visible_fraction"] = f"{result.visible_fraction:.3f}"
    return cells | {f"TTFT p{100 * q:g}": f"{result.ttft_at(q):.3f} s" for q in quantiles}


def verdict(limit: Limit, recommendation: Recommendation) -> str:
    """The recommendation in one line."""
    best, nearest = recommendation.best, recommendation.nearest
    if best is None:
        return (
            f"no setting is within {limit}; the nearest is {nearest.setting.in_words}: "
            f"{nearest.ttft_at(limit.quantile):.3g} s"
        )
    return (
        f"recommended within {limit}: {best.setting.in_words}; "
        f"{'accuracy' if best.accuracy else 'agreement'} {best.score}, "
        f"{best.ttft_at(limit.quantile):.3g} s"
    )


def warnings(evaluation: Evaluation, recommendation: Recommendation) -> list[str]:
    """Why not to trust it too far, a line each."""
    found = []
    number, few = len(evaluation.videos), evaluation.num_videos
    whole = "the sink and one block held the whole video"
    dense = {
        result.setting.name: number - result.sparse_prompts
        for result in evaluation.results
        if not result.setting.is_full and result.sparse_prompts < number
    }
    if never := ", ".join(name for name, prompts in dense.items() if prompts == number):
        found.append(f"never anything but full attention, and not recommended: {never} ({whole})")
    if some := ", ".join(f"{name} for {n}" for name, n in dense.items() if n < number):
        found.append(f"full attention, of {number} prompts: {some} ({whole})")
    if few < _FEW_VIDEOS:
        found.append(
            f"few videos ({few}): intervals are over videos, and too narrow with fewer than "
            f"{_FEW_VIDEOS}"
        )
    if recommendation.best and recommendation.rivals:
        names = ", ".join(rival.setting.name for rival in recommendation.rivals)
        found.append(
            f"{number} questions cannot tell {recommendation.best.setting.name} from {names} (the "
            f"fastest first); where no answer differed, up to {min(1.0, 3 / number):.0%} still "
            "may. More questions would tell"
        )
    return found


def _draw(results: Sequence[Result], best: Result | None, limit: Limit, path: Path) -> None:
    """A dot a setting, with the 95 % interval of its score; a ring is the best; a line the
    limit."""
    figure = picture.new_figure(900, 560, layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        score, place = result.score, (result.ttft_at(limit.quantile), result.score.value)
        colour = _FULL if result.setting.is_full else _PEVLM
        # With very few videos, the interval may miss the value.
        bars = [[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]]
        axes.errorbar(*place, bars, fmt="o", color=colour, ecolor="#cccccc", capsize=2, zorder=2)
        beside = {"xytext": (6, 4), "textcoords": "offset points"}
        axes.annotate(result.setting.name, place, **beside, fontsize=9, color=picture.INK)
        if result is best:
            ring = {"facecolors": "none", "edgecolors": _BEST, "linewidths": 2.5}
            axes.scatter(*place, s=240, **ring, label="recommended", zorder=3)
    line = {"color": picture.INK, "linestyle": "--", "linewidth": 1}
    axes.axvline(limit.seconds, **line, label=f"limit: {limit}")
    axes.set_xlabel(f"time to first token, {limit.quantile:g} quantile (s)")
    what = "accuracy" if results[0].accuracy else "agreement with full attention"
    axes.set_ylabel(f"{what} (bars: 95 % intervals)")
    axes.set_title("sink / block frames", fontsize=11, color=picture.INK)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    picture.save(figure, path)


def _write_preset(
    path: Path, setting: Setting, *, command: str, figures: str, server: Mapping[str, Any]
) -> None:
    """A file that ``--pevlm-config`` takes, checked on reading it again; the server's own
    ``image_runs`` goes with the setting where it is not the default."""
    launch = ["python", "-m", "sglang.launch_server", "--model-path", server["model_path"]]
    launch += ["--attention-backend", "pevlm", "--pevlm-config", str(path)]
    if sampling := server.get("mm_process_config"):
        launch += ["--mm-process-config", json.dumps(sampling)]
    title = "full attention unless a request asks for PEVLM"
    title = title if setting.is_full else setting.in_words
    header = [
        f"{title[0].upper()}{title[1:]}, chosen by pevlm tune for {server['model_path']}",
        f"on SGLang {server['sglang_version']}, {server['device']}, {server['dtype']}.",
        *("", f"  {shlex.join(launch)}"),
        *("", "Measured by", "", f"  {command}"),
        *("", figures, "", _PRECEDENCE),
    ]
    values = setting.options
    if (image_runs := server["pevlm_image_runs"]) != PevlmConfig().image_runs:
        values["image_runs"] = image_runs
    options = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
    if not setting.is_full:
        options[0] += " # sampled frames"
    commented = [f"# {line}".rstrip() for line in "\n".join(header).split("\n")]
    try:
        path.write_text("\n".join([*commented, "", *options]) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
    if resolve(path, {}) != PevlmConfig().override(values):
        raise ValueError(f"{path}: expected {values}, got another setting on reading it")
