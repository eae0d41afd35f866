"""Every table of the small model's results, and what reproduces, as Markdown from the JSON alone.

    python benchmarks/accuracy/tables.py

reads ``held_out.json``, ``sweep.json``, ``latency.json`` and ``attention_scores.json`` in
``results/`` and writes ``tables.md`` there. No sentence of it knows the outcome: each follows from
the numbers. Results of different weights are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.card import RESULTS
from accuracy.questions import CHANCE, TASKS

FILES = ("held_out", "sweep", "latency", "attention_scores")
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
    "ape_t1.0": "APE (T = 1.0), reused",
    "ape_t1.0_sequential": "APE (T = 1.0), sequential",
    "star_attention_reused": "Star-Attention, reused",
    "star_attention": "Star-Attention, sequential",
    "pevlm_without_sp": "PEVLM, reused",
    "pevlm": "PEVLM, sequential",
}
PARTS = {
    "text_before": "text before the video",
    "first_frames": "first frame pair",
    "sink_frames": "the sink's other frames",
    "other_frames": "frames after the sink",
    "text_behind": "text behind the video",
}
SCORED = {
    "full": "Full attention",
    "pevlm_without_sp": "PEVLM, positions reused",
    "pevlm": "PEVLM",
}
QUERIES = {"text": "all queries of the text behind the video", "last": "the last query"}
PAPER_RATIO = (0.9824, 1.048)


def read(directory: Path) -> dict[str, dict[str, Any]]:
    """Name → result.

    Raises:
        ValueError: a file that is missing, or results of different weights.
    """
    found = {}
    for name in FILES:
        path = directory / f"{name}.json"
        if not path.is_file():
            raise ValueError(
                f"{path}: expected a result, got no file; `make accuracy` makes all of them"
            )
        found[name] = json.loads(path.read_text())
    weights = {name: result["card"]["weights_sha256"][:12] for name, result in found.items()}
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"{directory}: expected results of the same weights, got {weights}; make those anew "
            "that are older"
        )
    return found


def percent(found: Mapping[str, Any], of: str = "accuracy") -> str:
    """An accuracy with its 95 % interval."""
    low, high = found["interval"]
    return f"{100 * found[of]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def difference(found: Mapping[str, Any]) -> str:
    """A difference of accuracies in points, with its 95 % interval."""
    low, high = found["interval"]
    return f"{100 * found['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_method(summary: Mapping[str, Any], names: Mapping[str, str], guessing: bool = True) -> str:
    """Table 1's form: tasks in the columns, and the difference to full attention."""
    rows = []
    if guessing:
        chance = [f"{100 * CHANCE[task]:.1f}" for task in TASKS]
        rows = [["(guessing)", *chance, f"{100 * sum(CHANCE.values()) / len(CHANCE):.1f}", "", ""]]
    for method, name in names.items():
        found = summary[method]
        tasks = [f"{100 * found['tasks'][task]['accuracy']:.1f}" for task in TASKS]
        against = ["", ""]
        if "minus_base" in found:
            p = found["minus_base"]["p_value"]
            against = [difference(found["minus_base"]), f"{p:.4f}"]
        rows.append([name, *tasks, percent(found), *against])
    return table(["Method", *TASKS, "mean (95 % interval)", "minus full", "p"], rows)


def ratio(found: Mapping[str, Any]) -> str:
    """PEVLM's accuracy over full attention's, against the paper's range."""
    low, high = found["interval"]
    least, most = PAPER_RATIO
    where = "above" if low >= least else "below" if high < least else "on both sides of"
    return (
        f"PEVLM reaches {100 * found['ratio']:.2f} % of full attention's accuracy (95 % interval "
        f"{100 * low:.2f} to {100 * high:.2f} %). The paper's models reach {100 * least:.2f} to "
        f"{100 * most:.2f} %; the interval lies {where} the lower end of that."
    )


def claims(found: Sequence[Mapping[str, Any]], unit: str = "points") -> str:
    """The paper's claims with their tests, and what it means where one is not reproduced."""
    rows = []
    for claim in found:
        low, high = claim["interval"]
        number = f"{100 * claim['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        rows.append([claim["says"], number, f"{claim['p_holm']:.4f}", f"**{claim['verdict']}**"])
    missing = [claim for claim in found if claim["verdict"] != "reproduced" and claim["otherwise"]]
    notes = dict.fromkeys(claim["otherwise"] for claim in missing)
    text = table(["the paper says", f"difference, {unit} (95 %)", "p (Holm)", "here"], rows)
    return (
        "\n".join([text, "", "What is not reproduced:", "", *(f"- {n}" for n in notes)])
        if notes
        else text
    )


def sizes(result: Mapping[str, Any]) -> str:
    """Figure 5: rows are sinks, columns blocks; accuracy, and the share of pairs computed."""
    summary, longest = result["summary"]["all"], max(result["visible_fraction"], key=int)
    shares = result["visible_fraction"][longest]
    rows = []
    for sink in result["sinks"]:
        names = [f"sink {sink}, blocks {block}" for block in result["blocks"]]
        cells = [
            f"{100 * summary[name]['accuracy']:.1f} / {100 * shares[name]:.0f} %" for name in names
        ]
        rows.append([f"{sink} frames" if sink else "text alone", *cells])
    grid = table(["sink", *(f"blocks of {block} frames" for block in result["blocks"])], rows)
    line = []
    for block, tokens in zip(result["blocks"], result["block_tokens"], strict=True):
        by_frames = f"sink {result['sink']}, blocks {block}"
        by_tokens = f"blocks {tokens} tokens"
        pair = [percent(summary[by_frames]), percent(summary[by_tokens])]
        line.append([f"{block} frames", f"{tokens} tokens", *pair])
    return (
        f"Mean accuracy of the tasks, and the share of full attention's (query, key) pairs that a "
        f"prompt of {longest} sampled frames computes. Full attention: "
        f"{percent(summary['full'])}.\n\n{grid}\n\nBlocks in frames and in tokens, which cut "
        f"frames, after a sink of {result['sink']} frames or about as many tokens:\n\n"
        + table(["blocks", "or", "in frames", "in tokens"], line)
    )


def under_limits(result: Mapping[str, Any]) -> str:
    """Table 2's form for a workload, and the latencies themselves."""
    settings = result["times"]
    rows = []
    for limit, by_setting in result["accuracy"].items():
        seconds = result["limits_s"].get(limit)
        name = f"{1e3 * seconds:.0f} ms ({limit} quantile)" if seconds else "no limit"
        rows.append([name, *(percent(by_setting[setting]) for setting in settings)])
    names = [name if name == "full" else f"PEVLM {name}, blocks of 16f" for name in settings]
    text = table(["limit", *names], rows)
    times = []
    for name, own in result["times"].items():
        low, high = own["quantiles_s"]
        longer = ["", ""]
        if "minus_full" in own:
            gap = own["minus_full"]
            ends = " to ".join(f"{1e3 * x:+.1f}" for x in gap["interval"])
            longer = [f"{1e3 * gap['difference']:+.1f} ({ends})", f"{gap['p_value']:.4f}"]
        median = f"{1e3 * own['median_s']:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})"
        first = f"{1e3 * own['ttft_median_s']:.0f}"
        times.append([name, median, first, f"{100 * own['visible_fraction']:.0f} %", *longer])
    return f"{text}\n\nLatencies of the same answers, in ms:\n\n" + table(
        [
            "setting",
            "median (10 % to 90 %)",
            "first token",
            "pairs computed",
            "minus full (95 %)",
            "p",
        ],
        times,
    )


def limited(workload: Mapping[str, Any]) -> list[str]:
    """What there is of a workload under limits."""
    shortest, longest = workload["times"]["full"]["prompt_tokens"]
    return [
        f"### Prompts of {shortest} to {longest} tokens",
        f"{workload['videos']} videos, {workload['questions']} questions of "
        f"{', '.join(workload['tasks'])}; one request at a time.",
        under_limits(workload),
        claims(workload["claims"]),
    ]


def scores(result: Mapping[str, Any], queries: str) -> str:
    """Where the attention of one kind of queries goes, in percent, and how far that is from full
    attention."""
    found = result["queries"][queries]["methods"]
    rows = []
    for method, name in SCORED.items():
        own = found[method]
        cells = [percent(own["parts"][part], "mean") for part in PARTS]
        rows.append([name, *cells, "" if method == "full" else percent(own["distance"], "mean")])
    header = [
        f"{name} ({end - start} tokens)"
        for name, (start, end) in zip(PARTS.values(), result["parts"].values(), strict=True)
    ]
    return table(["", *header, "elsewhere than under full attention"], rows)


def document(found: Mapping[str, Mapping[str, Any]]) -> str:
    """All of it."""
    held_out, sweep, latency, attention = (found[name] for name in FILES)
    card = held_out["card"]
    parts = [
        "# Results of the small video model",
        "Made by `make accuracy`; weights "
        f"`{card['weights_sha256'][:12]}`, torch {card['torch']}, transformers "
        f"{card['transformers']}. {card['videos']} held-out videos with {card['questions']} "
        f"questions; {sweep['card']['videos']} for the sizes, {attention['card']['videos']} for "
        f"the attention scores, {latency['card']['videos']} through the server. Numbers in "
        "brackets are 95 % bootstrap intervals over videos, in percent where nothing else is said. "
        "Differences are paired and tested by flipping signs of whole videos. A claim is "
        "*reproduced* where its difference has the paper's sign and p < 0.05 after Holm's "
        "correction over its table, *the opposite* with the other sign, and *not decided* "
        "otherwise: these videos cannot tell.",
        "## What the paper says, and what these answers say",
        ratio(held_out["pevlm_over_full"]),
        claims(held_out["claims"]),
    ]
    for frames, summary in held_out["summary"].items():
        where = "all lengths" if frames == "all" else f"{frames} sampled frames"
        parts += [f"## Accuracy by method, {where} (Table 1)", by_method(summary, MAIN)]
    summary = held_out["summary"]["all"]
    parts += [
        "Per task (Figures 1, 6 and 7):",
        "![accuracy by task](tasks.png)",
        "## Components of PEVLM (Tables 3, 5, 6)",
        by_method(summary, ABLATION, guessing=False),
        "## Positions (Table 4)",
        by_method(summary, REUSE, guessing=False),
        "## Sizes of sink and blocks (Figure 5)",
        sizes(sweep),
        claims(sweep["claims"]),
        "![accuracy against sizes](sizes.png)",
        "## Accuracy under a limit on latency (Table 2)",
        *(part for workload in latency["workloads"].values() for part in limited(workload)),
        "![latencies](latency.png)",
        "## Where attention goes (Figures 2, 8 to 10)",
    ]
    for queries, name in QUERIES.items():
        parts += [
            f"### Of {name}",
            scores(attention, queries),
            claims(attention["queries"][queries]["claims"], "percent of the attention"),
            f"![attention scores](attention_{queries}.png)",
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON")
    parser.add_argument("--output", type=Path, help="(default: tables.md there)")
    options = parser.parse_args()
    try:
        text = document(read(options.results))
    except ValueError as error:
        parser.error(str(error))
    output = options.output or options.results / "tables.md"
    output.write_text(text)
    print(output)


if __name__ == "__main__":
    main()
