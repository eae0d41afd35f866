"""The tables of ``results/held_out.json`` in Markdown, as the paper's tables 1, 3 and 4.

python benchmarks/accuracy/tables.py > benchmarks/accuracy/results/held_out.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.questions import CHANCE, TASKS

RESULTS = Path(__file__).parent / "results"
MAIN = {
    "full": "Full attention",
    "block_attention": "Block-Attention, no fine-tuning",
    "ape_t1.0": "APE (T = 1.0)",
    "ape_t0.9": "APE (T = 0.9)",
    "star_attention": "Star-Attention",
    "star_attention_reused": "Star-Attention, positions reused",
    "pevlm": "PEVLM",
}
ABLATION = {
    "no_component": "none",
    "only_sp": "SP",
    "only_sp_df": "SP, DF",
    "pevlm": "SP, DF, FS",
    "pevlm_without_sp": "DF, FS (no SP)",
    "pevlm_without_df": "SP, FS (no DF)",
}
REUSE = {
    "APE (T = 1.0)": ("ape_t1.0", "ape_t1.0_sequential"),
    "Star-Attention": ("star_attention_reused", "star_attention"),
    "PEVLM": ("pevlm_without_sp", "pevlm"),
}


def percent(found: dict[str, Any]) -> str:
    """An accuracy with its 95 % interval."""
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_method(summary: dict[str, Any]) -> str:
    """Table 1's form: tasks in the columns, and the difference to full attention."""
    chance = [f"{100 * CHANCE[task]:.1f}" for task in TASKS]
    rows = [["(guessing)", *chance, f"{100 * sum(CHANCE.values()) / len(CHANCE):.1f}", "", ""]]
    for method, name in MAIN.items():
        found = summary[method]
        tasks = [f"{100 * found['tasks'][task]['accuracy']:.1f}" for task in TASKS]
        against = [f"{100 * found['minus_full']:+.1f}", f"{found['p_value']:.4f}"]
        rows.append([name, *tasks, percent(found), *(against if method != "full" else ["", ""])])
    return table(["Method", *TASKS, "mean (95 % interval)", "minus full", "p"], rows)


def ablation(summary: dict[str, Any]) -> str:
    """Table 3's form, and each component left out alone."""
    rows = [[name, percent(summary[method])] for method, name in ABLATION.items()]
    return table(["Components", "mean accuracy"], rows)


def reuse(summary: dict[str, Any]) -> str:
    """Table 4's form."""
    rows = [[name, *(percent(summary[m]) for m in pair)] for name, pair in REUSE.items()]
    return table(["Method", "positions reused", "sequential"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=RESULTS / "held_out.json")
    options = parser.parse_args()
    result = json.loads(options.input.read_text())
    for frames, summary in result["summary"].items():
        where = "all lengths" if frames == "all" else f"{frames} sampled frames"
        print(f"## Accuracy by method, {where}\n\n{by_method(summary)}\n")
    print(f"## Components of PEVLM\n\n{ablation(result['summary']['all'])}\n")
    print(f"## Positions\n\n{reuse(result['summary']['all'])}")


if __name__ == "__main__":
    main()
