"""Every figure of the small model's results, as PNG from the JSON alone.

    python benchmarks/accuracy/figures.py

reads the JSON of ``tables.py`` and writes beside it ``tasks.png`` (the paper's Figures 1, 6, 7),
``sizes.png`` (5), ``latency.png`` (Table 2), ``attention_text.png`` and ``attention_last.png``
(2, 8 to 10). The last line is a JSON list of the files.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.card import RESULTS
from accuracy.questions import CHANCE, TASKS
from accuracy.tables import QUERIES, SCORED, read

RADAR = {
    "full": ("Full attention", "black"),
    "pevlm": ("PEVLM", "tab:green"),
    "ape_t1.0": ("APE (T = 1.0)", "tab:orange"),
    "block_attention": ("Block-Attention", "tab:blue"),
    "star_attention_reused": ("Star-Attention, reused", "tab:red"),
}
COLOURS = ("black", "tab:orange", "tab:green")  # of settings and of attention scores
DPI = 90


def tasks(result: Mapping[str, Any], path: Path) -> None:
    """A radar of the tasks for each held-out length."""
    lengths = [name for name in result["summary"] if name != "all"]
    figure, panels = pyplot.subplots(
        1, len(lengths), figsize=(5.2 * len(lengths), 5.4), subplot_kw={"projection": "polar"}
    )
    angles = [2 * math.pi * i / len(TASKS) for i in range(len(TASKS) + 1)]
    for axes, length in zip(panels, lengths, strict=True):
        guessing = [100 * CHANCE[task] for task in TASKS]
        axes.fill(angles, [*guessing, guessing[0]], color="0.85", label="guessing")
        for method, (name, colour) in RADAR.items():
            found = result["summary"][length][method]["tasks"]
            values = [100 * found[task]["accuracy"] for task in TASKS]
            style = "--" if method == "full" else "-"
            axes.plot(angles, [*values, values[0]], style, color=colour, label=name, lw=1.6)
        axes.set(ylim=(0, 100), title=f"{length} sampled frames")
        axes.set_xticks(angles[:-1], TASKS)
        axes.set_yticks([25, 50, 75, 100], ["25", "50", "75", "100 %"], fontsize=7)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=8)
    _save(figure, path, bottom=0.06)


def sizes(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy against the sink, against the blocks in frames and tokens, and of each pair."""
    figure, (by_sink, by_block, grid) = pyplot.subplots(
        1, 3, figsize=(14, 4.2), width_ratios=[1, 1, 1.2]
    )
    summary = result["summary"]["all"]
    sinks, blocks = result["sinks"], result["blocks"]
    for axes in (by_sink, by_block):
        low, high = (100 * x for x in summary["full"]["interval"])
        axes.axhspan(low, high, color="0.9")
        axes.axhline(100 * summary["full"]["accuracy"], color="black", ls="--", label="full")
        axes.set(ylabel="mean accuracy of the tasks, %")
        axes.grid(alpha=0.3)
    labels = [f"sys+{sink}f" if sink else "sys" for sink in sinks]
    _line(by_sink, summary, [f"sink {s}, blocks {result['block']}" for s in sinks], "PEVLM")
    by_sink.set_xticks(range(len(sinks)), labels)
    by_sink.set(xlabel=f"sink (blocks of {result['block']} frames)")
    _line(by_block, summary, [f"sink {result['sink']}, blocks {b}" for b in blocks], "in frames")
    tokens = [f"blocks {n} tokens" for n in result["block_tokens"]]
    _line(by_block, summary, tokens, "in tokens, half a frame pair less", 0.08)
    by_block.set_xticks(range(len(blocks)), [f"{block}f" for block in blocks])
    by_block.set(xlabel=f"blocks (sink of {result['sink']} frames)")
    for axes in (by_sink, by_block):
        axes.legend(fontsize=8, loc="lower right")
    low = min(by_sink.get_ylim()[0], by_block.get_ylim()[0])
    high = max(by_sink.get_ylim()[1], by_block.get_ylim()[1])
    by_sink.set_ylim(low, high)
    by_block.set_ylim(low, high)
    values = np.array(
        [[100 * summary[f"sink {s}, blocks {b}"]["accuracy"] for b in blocks] for s in sinks]
    )
    longest = max(result["visible_fraction"], key=int)
    shares = result["visible_fraction"][longest]
    image = grid.imshow(values, aspect="auto", cmap="viridis", origin="lower")
    for i, sink in enumerate(sinks):
        for j, block in enumerate(blocks):
            share = 100 * shares[f"sink {sink}, blocks {block}"]
            dark = values[i, j] < values.mean()
            text = f"{values[i, j]:.1f}\n{share:.0f} %"
            grid.text(j, i, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
    grid.set_xticks(range(len(blocks)), [f"{block}f" for block in blocks])
    grid.set_yticks(range(len(sinks)), labels)
    grid.set(xlabel="blocks", title=f"accuracy, and pairs computed at {longest} frames")
    figure.colorbar(image, ax=grid)
    _save(figure, path)


def latency(result: Mapping[str, Any], path: Path) -> None:
    """A row a workload: the latencies with the limits, and the accuracy under each."""
    workloads = result["workloads"]
    figure, panels = pyplot.subplots(len(workloads), 2, figsize=(11, 4 * len(workloads)))
    column = {name: i for i, name in enumerate(result["columns"])}
    for (name, found), (times, bars) in zip(workloads.items(), panels, strict=True):
        answers = [row for row in result["answers"] if row[column["workload"]] == name]
        for setting, colour in zip(result["settings"], COLOURS, strict=True):
            own = [r for r in answers if r[column["setting"]] == setting]
            at = sorted(1e3 * row[column["latency_s"]] for row in own)
            times.step(
                at, np.arange(1, len(at) + 1) / len(at), color=colour, label=setting, where="post"
            )
        for limit, seconds in found["limits_s"].items():
            times.axvline(1e3 * seconds, color="0.6", ls=":")
            times.text(1e3 * seconds, 0.02, f" {limit}", fontsize=8, color="0.4")
        times.set(xlabel="latency, ms", ylabel="share of answers", xscale="log", ylim=(0, 1))
        for formatter in (times.xaxis.set_major_formatter, times.xaxis.set_minor_formatter):
            formatter("{x:.0f}")
        times.tick_params(axis="x", which="both", labelsize=8)
        times.legend()
        shortest, longest = found["times"]["full"]["prompt_tokens"]
        times.set(title=f"prompts of {shortest} to {longest} tokens")
        _bars(bars, found, result["settings"])
    _save(figure, path)


def _bars(axes: Any, found: Mapping[str, Any], settings: Sequence[str]) -> None:
    """Accuracy of each setting under each limit."""
    limits, seconds = found["accuracy"], found["limits_s"]
    width = 0.8 / len(settings)
    for i, (setting, colour) in enumerate(zip(settings, COLOURS, strict=True)):
        own = [limits[limit][setting] for limit in limits]
        at = np.arange(len(limits)) + (i - 1) * width
        axes.bar(at, [100 * one["accuracy"] for one in own], width, color=colour, alpha=0.6)
        _errors(axes, at, own, colour)
    names = [f"{1e3 * seconds[n]:.0f} ms" if n in seconds else "no limit" for n in limits]
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="limit", ylabel="mean accuracy of the tasks, %", ylim=(0, 104))


def attention(result: Mapping[str, Any], queries: str, path: Path) -> None:
    """All tokens above, the video's below; a column a method."""
    found = result["queries"][queries]["methods"]
    figure, panels = pyplot.subplots(2, len(SCORED), figsize=(14, 6), sharey="row")
    video = (result["parts"]["first_frames"][0], result["parts"]["other_frames"][1])
    whole = (0, result["parts"]["text_behind"][1])
    sink_end = result["parts"]["other_frames"][0]
    base = np.array(found["full"]["distribution"])
    window = result["moving_average_tokens"]
    for column, ((method, name), colour) in enumerate(zip(SCORED.items(), COLOURS, strict=True)):
        values = np.array(found[method]["distribution"])
        for axes, (start, end) in zip(panels[:, column], (whole, video), strict=True):
            at = np.arange(start, end)
            axes.plot(at, values[start:end], color=colour, alpha=0.3, lw=0.8, label="score")
            axes.plot(
                at, moving_average(values[start:end], window), color=colour, label="mean score"
            )
            if method != "full":
                mean = moving_average(base[start:end], window)
                axes.plot(at, mean, "k--", lw=1, label="mean score, full attention")
            axes.axvline(video[0], color="0.8", lw=0.8)
            for cut in range(sink_end, video[1] + 1, result["block_tokens"]):
                axes.axvline(cut, color="0.8", lw=0.8)
            axes.set(yscale="log", xlim=(start, end))
        distance = 100 * found[method]["distance"]["mean"]
        more = "" if method == "full" else f", {distance:.1f} % of it elsewhere"
        panels[0, column].set(title=f"{name}{more}")
        panels[1, column].set(xlabel="token of the prompt")
        panels[0, column].legend(fontsize=7, loc="lower left")
    panels[0, 0].set(ylabel="all tokens")
    panels[1, 0].set(ylabel="the video's tokens")
    figure.suptitle(
        f"attention of {QUERIES[queries]}; mean score: moving average of {window} tokens; "
        "lines: sink and blocks",
        fontsize=10,
    )
    _save(figure, path)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Of as many values, over those of the window that there are at the ends."""
    ones = np.ones(window)
    found: np.ndarray = np.convolve(values, ones, "same") / np.convolve(
        np.ones(len(values)), ones, "same"
    )
    return found


def _line(
    axes: Any, summary: Mapping[str, Any], names: Sequence[str], label: str, shift: float = 0
) -> None:
    at = np.arange(len(names)) + shift
    found = [summary[name] for name in names]
    (line,) = axes.plot(at, [100 * one["accuracy"] for one in found], "o-", label=label)
    _errors(axes, at, found, line.get_color())


def _errors(axes: Any, at: np.ndarray, found: Sequence[Mapping[str, Any]], colour: str) -> None:
    """95 % intervals."""
    middle = np.array([one["accuracy"] for one in found])
    ends = np.array([one["interval"] for one in found])
    # A quantile of the resamples can lie on the other side of the accuracy by its rounding.
    error = np.maximum(0, [middle - ends[:, 0], ends[:, 1] - middle])
    axes.errorbar(at, 100 * middle, 100 * error, fmt="none", color=colour, capsize=3, lw=1)


def _save(figure: Any, path: Path, bottom: float = 0) -> None:
    """In 128 colours, which takes a third of the bytes."""
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=DPI, bbox_inches="tight")
        image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        image.save(path, optimize=True)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON")
    parser.add_argument("--to", type=Path, help="folder of the figures (default: the same)")
    options = parser.parse_args()
    try:
        found = read(options.results)
    except ValueError as error:
        parser.error(str(error))
    to: Path = options.to or options.results
    to.mkdir(parents=True, exist_ok=True)
    print(json.dumps([str(path) for path in draw(found, to)]))


def draw(found: Mapping[str, Mapping[str, Any]], to: Path) -> list[Path]:
    """All of them; the files."""
    paths = [to / f"{name}.png" for name in ("tasks", "sizes", "latency")]
    tasks(found["held_out"], paths[0])
    sizes(found["sweep"], paths[1])
    latency(found["latency"], paths[2])
    for queries in QUERIES:
        paths.append(to / f"attention_{queries}.png")
        attention(found["attention_scores"], queries, paths[-1])
    return paths


if __name__ == "__main__":
    main()
