"""The demo's first part: right answers about a video made on the spot.

Method. ``accuracy.dataset`` draws a video, which no training has seen, and questions with known
answers. A real SGLang server on the CPU serves the small model of ``benchmarks/accuracy``, which
reads such videos, and answers each question under full attention and under PEVLM, greedily, on
empty caches. The demo fails unless each answer is the right one, and so the same, under both.

The video and its questions are examples, chosen among those that the model answers surely: they
show the model at work, while how often it is right is measured on many (``accuracy/evaluate.py``,
``accuracy/server_gate.py``). At this length attention takes no time that shows: the times are those
of reading the video, under both.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accuracy.dataset import EXAMPLE, make_clip
from accuracy.server_gate import MODEL, SERVER_FLAGS
from demo_request import Answer, ask, check, num_blocks, serving, vocabulary_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # `support` lives there

from support.video import video_data_url

SCENES = 40  # seconds
VIDEO = 10  # its number among the examples: each answer is 5 nats or more ahead of the next
TASKS = ("code", "find", "cross", "order", "occurrence", "time")


def run(work: Path, *, video: int, port: int | None) -> dict[str, Any]:
    """The first part, printed.

    Args:
        work: directory for the video and the server's log.
        video: its number among the examples.
        port: of the server; None takes a free one.

    Returns:
        Its figures.
    """
    clip = make_clip(EXAMPLE, SCENES, video, 1, TASKS)
    path = clip.write(work)
    url = video_data_url(path)
    print(f"a video made on the spot: {path}, {SCENES} s, {clip.frames} sampled frames")
    print("starting the server of the small trained model (about a minute) ...", flush=True)
    vocabulary = vocabulary_of(MODEL)
    rows: list[dict[str, Any]] = []
    with serving(MODEL, work / "answers.log", port, *SERVER_FLAGS) as client:

        def both(question: str) -> tuple[Answer, Answer]:
            full, pevlm = (
                ask(client, url, question, vocabulary=vocabulary, pevlm=on) for on in (False, True)
            )
            check(pevlm, full)
            return full, pevlm

        both(clip.questions[0].text)  # the first requests take longer
        tokens = 0
        blocks = num_blocks(client, clip.frames)
        print(f"\n{'question':34}{'right answer':14}{'full attention':>22}{'PEVLM':>22}")
        for question in clip.questions:
            full, pevlm = both(question.text)
            tokens = max(tokens, full.prompt_tokens)
            said = [f"{a.text} {a.ttft:8.2f} s" for a in (full, pevlm)]
            print(f"{question.text:34}{question.answer:14}{said[0]:>22}{said[1]:>22}", flush=True)
            right = [a.ended and a.text == question.answer for a in (full, pevlm)]
            rows.append(
                {
                    "question": question.text,
                    "right_answer": question.answer,
                    "full": full.text,
                    "pevlm": pevlm.text,
                    "ttft_full_s": round(full.ttft, 3),
                    "ttft_pevlm_s": round(pevlm.ttft, 3),
                    "right": all(right),
                }
            )
    if wrong := [row["question"] for row in rows if not row["right"]]:
        sys.exit(
            f"demo: expected the right answer under full attention and under PEVLM, got another to "
            f"{', '.join(wrong)}. Wrong under PEVLM alone, the mask or this video is to blame; "
            "with other weights, or a video that was not chosen for it, the model may just err: "
            "try --video NUMBER"
        )
    print(f"\nall right, and the same; {tokens} tokens, {blocks} context blocks\n")
    return {"video": path.name, "answers": rows}
