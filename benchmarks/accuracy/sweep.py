"""Accuracy of PEVLM against the sizes of sink and blocks (the paper's Figure 5), as JSON.

    python benchmarks/accuracy/sweep.py

Method. The videos, questions and scoring of ``evaluate.py``, under PEVLM with each pair of sink and
block size in sampled frames; a sink of 0 frames is the text alone. Blocks in tokens, which cut
frames, stand beside those in frames: two tokens fewer than each, half a frame pair.

``results/sweep.json`` holds a card, for each setting its accuracy and the share of full attention's
(query, key) pairs that it computes, by length of video, and the paper's claims with their tests.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.answers import Answers, write
from accuracy.card import RESULTS, card
from accuracy.claims import Claim, better, tested
from accuracy.dataset import HELD_OUT_SCENES
from accuracy.evaluate import ask_held_out, by_length, parse
from accuracy.methods import Method, full, pevlm
from accuracy.model import STEP_TOKENS
from accuracy.reader import Reader

FRAMES_PER_STEP = 2
SINKS = (0, 2, 4, 8, 16)  # sampled frames
BLOCKS = (2, 4, 8, 16, 24)
SINK = BLOCK = 16  # of the sweep over the other
QUESTION_TOKENS = 14  # behind a video: the median question with its answer


def name(sink: int, block: int) -> str:
    """Of a setting, in sampled frames."""
    return f"sink {sink}, blocks {block}"


def token_name(tokens: int) -> str:
    """Of blocks in tokens, after a sink that is cut by tokens too."""
    return f"blocks {tokens} tokens"


def tokens_of(frames: int) -> int:
    """Tokens of a block that is about ``frames`` long and ends in the middle of a frame."""
    return frames // FRAMES_PER_STEP * STEP_TOKENS - STEP_TOKENS // 2


def settings() -> dict[str, Method]:
    """Every setting of the sweep."""
    found: dict[str, Method] = {"full": full}
    for sink in SINKS:
        for block in BLOCKS:
            found[name(sink, block)] = pevlm(
                sink_steps=sink // FRAMES_PER_STEP,
                block_steps=block // FRAMES_PER_STEP,
                block_tokens=tokens_of(block),
                fs=sink > 0,
            )
    by_tokens = partial(pevlm, sink_steps=0, block_steps=1, df=False, sink_tokens=tokens_of(SINK))
    for block in BLOCKS:
        found[token_name(tokens_of(block))] = by_tokens(block_tokens=tokens_of(block))
    return found


def claims() -> list[Claim]:
    """The ends of Figure 5's curves, and frames against tokens at the paper's size."""
    return [
        better(
            f"a sink of {SINKS[-1]} frames is above the text alone (Figure 5)",
            name(SINKS[-1], BLOCK),
            name(0, BLOCK),
            "The sink: these videos show no gain from frames in it; see the attention scores.",
        ),
        better(
            f"blocks of {BLOCKS[-1]} frames are above blocks of {BLOCKS[0]} (Figure 5)",
            name(SINK, BLOCKS[-1]),
            name(SINK, BLOCKS[0]),
        ),
        better(
            f"blocks of {BLOCK} frames are above blocks of {tokens_of(BLOCK)} tokens (section 3.3)",
            name(SINK, BLOCK),
            token_name(tokens_of(BLOCK)),
            "Frames against tokens: few cuts go through a frame pair of 4 tokens, and each token "
            "shows its quarter by itself.",
        ),
    ]


def visible_fraction(reader: Reader, scenes: int, method: Method) -> float:
    """Computed over full attention's (query, key) pairs, of a prompt with a median question."""
    prompt = reader.prompt(scenes, QUESTION_TOKENS)
    pairs = prompt.length * (prompt.length + 1) // 2
    return round(int(method(prompt).visible.sum()) / pairs, 4)


def main() -> None:
    options = parse(__doc__, RESULTS / "sweep.json")
    methods = settings()
    reader, cases, rows = ask_held_out(options, methods)
    result: dict[str, Any] = {
        "card": card(options.model, videos=len(cases), questions=len(rows)),
        "sinks": SINKS,
        "blocks": BLOCKS,
        "sink": SINK,
        "block": BLOCK,
        "block_tokens": [tokens_of(block) for block in BLOCKS],
        "summary": by_length(rows, [*methods]),
        "visible_fraction": {
            str(2 * scenes): {n: visible_fraction(reader, scenes, m) for n, m in methods.items()}
            for scenes in HELD_OUT_SCENES
        },
        "claims": tested(claims(), Answers.of(rows, [*methods])),
    }
    write(options.output, result, rows, [*methods])
    for setting, found in result["summary"]["all"].items():
        print(f"{setting:24} {found['accuracy']:.3f} {found['interval']}")


if __name__ == "__main__":
    main()
