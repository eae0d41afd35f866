"""Figures from the JSON of the other benchmarks alone.

    python benchmarks/plot.py benchmarks/results/*.json --to figures

``attention-*.png``: speed-up over the best full attention against the length, with what the
arithmetic allows, and the time per token. ``llm_prefill-*.png``: attention and the rest, full
beside PEVLM, as in the paper's Figure 4. ``serving-*.png``: the parts of the time to first token.
Results without a figure are left out. The last line is a JSON list of the files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

SERVING_PARTS = ("decode", "preprocess", "vision", "attention", "other_prefill", "rest")


def plot_attention(result: dict[str, Any], path: Path) -> None:
    rows = [
        row
        for row in result["rows"]
        if row["sweep"] == "length" and row["kind"] == "pevlm" and row["green"]
    ]
    figure, (speed, cost) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    lengths = sorted({row["length"] for row in rows})
    allowed = {row["length"]: 1 / row["visible_fraction"] for row in rows}
    speed.plot(lengths, [allowed[n] for n in lengths], "k--", label="what the arithmetic allows")
    for name in dict.fromkeys(row["name"] for row in rows):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["length"])
        at = [row["length"] for row in own]
        speed.plot(at, [row["speedup"] for row in own], "o-", label=name)
        if "linear" not in result:
            cost.plot(at, [row["ns_per_token"] for row in own], "o-", label=name)
    if linear := result.get("linear"):
        at = [row["length"] for row in linear]
        cost.plot(at, [row["ns_per_token"] for row in linear], "o-", label="time")
        first = linear[0]["ns_per_pair"]
        allowed_ns = [first * row["pairs_per_token"] for row in linear]
        cost.plot(at, allowed_ns, "k--", label="as many pairs, at the first one's speed")
        cost.legend()
    speed.set(ylabel="speed-up over the best full attention", yscale="log")
    cost.set(ylabel="ns a token", ylim=(0, None))
    _finish(figure, (speed, cost), result, path)


def plot_llm_prefill(result: dict[str, Any], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    rows = sorted(result["rows"], key=lambda row: row["length"])
    for offset, (kind, color) in enumerate((("full", "tab:gray"), ("pevlm", "tab:green"))):
        at = [i + 0.4 * offset for i in range(len(rows))]
        attention = [row[kind]["attention_s"] for row in rows]
        other = [row[kind]["other_s"] for row in rows]
        axes.bar(at, attention, 0.38, color=color, label=f"{kind}: attention")
        axes.bar(at, other, 0.38, attention, color=color, alpha=0.4, label=f"{kind}: other")
    axes.set_xticks([i + 0.2 for i in range(len(rows))], [f"{row['length']:,}" for row in rows])
    axes.set(xlabel="tokens", ylabel="seconds of prefill")
    axes.legend()
    path_of_it = "SGLang" if result["path"] == "sglang" else "Hugging Face"
    title = f"{result['model']} on {result['card']['device']}, {path_of_it}'s path"
    figure.suptitle(title + _unfinished(result))
    _save(figure, path)


def plot_serving(result: dict[str, Any], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    single = result["alone"]
    colors = dict(zip(SERVING_PARTS, pyplot.get_cmap("tab10").colors, strict=False))
    for at, kind in enumerate(("pevlm", "full")):
        left = 0.0
        for part, color in colors.items():
            # What is left of the whole may come out below nothing.
            width = max(single[kind][f"{part}_s"], 0.0)
            axes.barh(at, width, left=left, color=color, label=None if at else part)
            left += width
    axes.set_yticks([0, 1], ["pevlm", "full"])
    axes.set(xlabel="seconds to the first token")
    axes.legend(ncols=len(colors), loc="upper center", bbox_to_anchor=(0.5, -0.3), fontsize=8)
    title = f"{result['model']}, {single['prompt_tokens']:,} tokens, {result['card']['device']}"
    figure.suptitle(title + _unfinished(result), fontsize=10)
    _save(figure, path)


def _unfinished(result: dict[str, Any]) -> str:
    return "" if result["complete"] else " (cut short)"


def _finish(figure: Any, all_axes: Any, result: dict[str, Any], path: Path) -> None:
    for axes in all_axes:
        axes.set(xlabel="tokens", xscale="log")
        axes.grid(alpha=0.3)
    all_axes[0].legend()
    title = f"one attention layer on {result['card']['device']}"
    figure.suptitle(title + _unfinished(result))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


PLOTS = {
    "attention": plot_attention,
    "llm_prefill": plot_llm_prefill,
    "serving": plot_serving,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="figures from benchmark results")
    parser.add_argument("results", type=Path, nargs="+", help="JSON files")
    parser.add_argument("--to", type=Path, default=Path("figures"), help="folder of the figures")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    written = []
    for file in options.results:
        result = json.loads(file.read_text())
        if result.get("benchmark") not in PLOTS:
            print(f"{file}: no figure for the benchmark {result.get('benchmark')!r}")
            continue
        path = options.to / f"{file.stem}.png"
        PLOTS[result["benchmark"]](result, path)
        written.append(str(path))
    print(json.dumps(written))


if __name__ == "__main__":
    main()
