"""Answers of the small model to held-out videos under each method, as JSON.

    python benchmarks/accuracy/evaluate.py --videos 100

Method. Held-out videos (own seeds, and lengths that training never saw: 64 and 96 sampled frames)
are encoded with H.264, read back through ``qwen-vl-utils``, and asked questions of each task. A
question is answered under each method of ``methods.py`` on Hugging Face's model in fp32
(``reader.py``). An answer is right when the model's greedy answer is the right one to the last
token and then ends. Intervals and tests: ``answers.py``.

``results/held_out.json`` holds a card, the summary of all lengths and of each, the paper's claims
with their tests, and every question with the methods that answered it right. ``tables.py`` and
``figures.py`` go on from there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.answers import Answers, summary, write
from accuracy.card import MODEL, RESULTS, card
from accuracy.claims import Claim, better, tested
from accuracy.dataset import HELD_OUT_SCENES
from accuracy.methods import Method, ape, block_attention, full, pevlm, star_attention
from accuracy.reader import THREADS, Case, Reader, held_out

SINK_STEPS = BLOCK_STEPS = 8  # 16 sampled frames
BLOCK_TOKENS = 30  # about as many; as with the paper's 4096, no whole number of frames
CLAIMS = (
    better("PEVLM is above Block-Attention (Table 1)", "pevlm", "block_attention"),
    better("PEVLM is above APE (Table 1)", "pevlm", "ape_t1.0"),
    better("PEVLM is above Star-Attention, reused (Table 1)", "pevlm", "star_attention_reused"),
    better(
        "PEVLM is above Star-Attention, sequential (Table 4)",
        "pevlm",
        "star_attention",
        "Star-Attention with its own positions differs from PEVLM in the cuts alone: by tokens, "
        "and with the text counted in the first block. Where cuts cost little, so does it.",
    ),
    better("SP helps (Table 3)", "only_sp", "no_component"),
    better(
        "DF on top of SP helps (Table 3)",
        "only_sp_df",
        "only_sp",
        "DF: a frame pair is 4 tokens here, and each shows its quarter by itself, so that a cut "
        "through a pair takes little from it; in the paper's models a pair is some 300 tokens.",
    ),
    better(
        "FS on top of SP and DF helps (Table 3)",
        "pevlm",
        "only_sp_df",
        "FS: frames in the sink protect what a model attends to in its first frames; see the "
        "attention scores for what this one does, and Figure 5's form for every size of sink.",
    ),
    Claim(
        "SP helps more than DF on top of it (Table 3)",
        {"only_sp": 2, "no_component": -1, "only_sp_df": -1},
    ),
    Claim(
        "SP helps more than FS on top of SP and DF (Table 3)",
        {"only_sp": 1, "no_component": -1, "pevlm": -1, "only_sp_df": 1},
    ),
    better("APE: sequential above reused positions (Table 4)", "ape_t1.0_sequential", "ape_t1.0"),
    better(
        "Star-Attention: sequential above reused positions (Table 4)",
        "star_attention",
        "star_attention_reused",
    ),
    better("PEVLM: sequential above reused positions (Table 4)", "pevlm", "pevlm_without_sp"),
)
"""Directions that the paper's tables show for Qwen2.5-VL, the family of the small model."""


def all_methods() -> dict[str, Method]:
    """The rows of the tables."""
    ours = partial(pevlm, sink_steps=SINK_STEPS, block_steps=BLOCK_STEPS, block_tokens=BLOCK_TOKENS)
    size = BLOCK_TOKENS
    return {
        "full": full,
        "block_attention": block_attention(block_tokens=size),
        "ape_t1.0": ape(block_tokens=size),
        "ape_t0.9": ape(block_tokens=size, temperature=0.9),
        "star_attention": star_attention(block_tokens=size),
        "pevlm": ours(),
        "pevlm_without_sp": ours(sp=False),
        "pevlm_without_df": ours(df=False),
        "pevlm_without_fs": ours(fs=False),
        "only_sp": ours(df=False, fs=False),
        "only_sp_df": ours(fs=False),
        "no_component": ours(sp=False, df=False, fs=False),
        "ape_t1.0_sequential": ape(block_tokens=size, sequential=True),
        "star_attention_reused": star_attention(block_tokens=size, reuse=True),
    }


def evaluate(
    reader: Reader, cases: Sequence[Case], methods: Mapping[str, Method]
) -> list[dict[str, Any]]:
    """One row a question: which methods answered it right."""
    rows = []
    for number, case in enumerate(cases):
        right = {
            name: reader.right(case.features, case.questions, m) for name, m in methods.items()
        }
        for i, question in enumerate(case.questions):
            rows.append(
                {
                    "video": number,
                    "frames": case.frames,
                    "task": question.task,
                    "question": question.text,
                    "answer": question.answer,
                    "right": {name: right[name][i] for name in methods},
                }
            )
    return rows


def by_length(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """``summary`` of all videos and of each held-out length, against full attention."""
    found = {"all": summary(rows, methods, "full")}
    for scenes in HELD_OUT_SCENES:
        own = [row for row in rows if row["frames"] == 2 * scenes]
        found[str(2 * scenes)] = summary(own, methods, "full")
    return found


def parse(doc: str, output: Path) -> argparse.Namespace:
    """The options of a script that asks about held-out videos.

    Args:
        doc: its docstring.
        output: where its JSON goes by default.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--videos", type=int, default=100, help="of each length")
    parser.add_argument("--each", type=int, default=3, help="questions a task and video")
    parser.add_argument("--output", type=Path, default=output)
    return parser.parse_args()


def ask_held_out(
    options: argparse.Namespace, methods: Mapping[str, Method]
) -> tuple[Reader, list[Case], list[dict[str, Any]]]:
    """The reader, the held-out videos, and :func:`evaluate`'s rows."""
    torch.set_num_threads(THREADS)
    reader = Reader(options.model)
    with tempfile.TemporaryDirectory() as work:
        cases = held_out(reader, options.videos, options.each, Path(work))
    return reader, cases, evaluate(reader, cases, methods)


def main() -> None:
    options = parse(__doc__, RESULTS / "held_out.json")
    methods = all_methods()
    _, cases, rows = ask_held_out(options, methods)
    answers = Answers.of(rows, [*methods])
    result: dict[str, Any] = {
        "card": card(
            options.model,
            sink_frames=2 * SINK_STEPS,
            block_frames=2 * BLOCK_STEPS,
            block_tokens=BLOCK_TOKENS,
            videos=len(cases),
            questions=len(rows),
        ),
        "summary": by_length(rows, [*methods]),
        "pevlm_over_full": answers.ratio("pevlm", "full"),
        "claims": tested(CLAIMS, answers),
    }
    write(options.output, result, rows, [*methods])
    for name, found in result["summary"]["all"].items():
        tasks = " ".join(f"{task} {v['accuracy']:.3f}" for task, v in found["tasks"].items())
        print(f"{name:24} {found['accuracy']:.3f} {found['interval']} | {tasks}")


if __name__ == "__main__":
    main()
