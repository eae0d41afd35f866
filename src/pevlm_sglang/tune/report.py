"""What the sweep found: as text, and as a preset that says where it comes from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pevlm_sglang.settings.config import PevlmConfig, resolve
from pevlm_sglang.tune.measurements import FULL, Setting
from pevlm_sglang.tune.results import Evaluation, Limit, Recommendation, Result, Share

PRESET_FILE = "preset.yaml"

_FEW_VIDEOS = 10  # below which a bootstrap over videos makes intervals that are too narrow
_PRECEDENCE = (
    "Precedence: defaults < this file < --pevlm-... flags < "
    'a request\'s custom_params={"pevlm": {...}}.'
)


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
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


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


def write_preset(
    path: Path, setting: Setting, *, command: str, figures: str, server: Mapping[str, Any]
) -> None:
    """Write a file that ``--pevlm-config`` takes, and check that it says what it should.

    Args:
        path: of the file.
        setting: to serve; the server's own ``image_runs`` goes with it where it is not the default.
        command: that measured it.
        figures: what was measured, as text.
        server: ``sweep.describe_server``.

    Raises:
        ValueError: it cannot be written, or does not load as the setting.
    """
    launch = ["python", "-m", "sglang.launch_server", "--model-path", server["model_path"]]
    launch += ["--attention-backend", "pevlm", "--pevlm-config", str(path)]
    if sampling := server.get("mm_process_config"):
        launch += ["--mm-process-config", json.dumps(sampling)]
    title = (
        "full attention unless a request asks for PEVLM" if setting.is_full else setting.in_words
    )
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


def _row(result: Result, quantiles: Sequence[float]) -> list[str]:
    distance = result.logprob_difference
    baseline = result.setting == FULL
    cells = [result.setting.name]
    if result.accuracy:
        cells += [_share(result.accuracy), "" if baseline else _signed(result.difference)]
        cells += ["" if baseline else f"{result.agreement.value:.1%}"]
    else:
        cells += ["" if baseline else _share(result.agreement)]
    cells += ["" if baseline or distance is None else f"{distance:.4f}"]
    cells.append(f"{result.visible_fraction:.3f}")
    return [*cells, *(f"{result.ttft_at(quantile):.3f} s" for quantile in quantiles)]


def _share(share: Share) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _signed(share: Share) -> str:
    """In percentage points."""
    value, low, high = (f"{100 * part:+.1f}" for part in (share.value, share.low, share.high))
    return f"{value} ({low} to {high})"
