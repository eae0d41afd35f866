"""The demo's second part: what PEVLM saves where a prompt is long.

Method. A video of noise and moving bars goes through the OpenAI API to a real SGLang server on the
CPU, which serves a small random Qwen2.5-VL: ten layers, so that attention matters as it does in a
large model, behind a vision tower of one. The same request is answered alternately under PEVLM and
under full attention, which a request chooses by ``custom_params={"pevlm": {"enabled": false}}``;
the medians are compared.

What makes the comparison fair:

- One server, one video, one question. Time to first token is what the client sees, from sending the
  request to the first streamed token; decoding, processor and vision tower are in it.
- Nothing is reused: ``/flush_cache`` empties the prefix cache before every request, and the cache
  of video embeddings is off (``SGLANG_VLM_CACHE_SIZE_MB=0``), so both sides pay the vision tower.
- One chunk (``--chunked-prefill-size -1``). In chunks, SGLang's ``torch_native`` full attention
  computes the whole prefix again for each, which would be too weak a baseline.
- One request under each before the clock starts, on a short video.
- ``visible_fraction`` is counted by the server, not predicted. The demo fails if full attention
  saved a pair, PEVLM saved none, or either did not prefill the whole prompt.

``answer_logprob_diff`` is the largest absolute difference of the first answer token's log-prob,
over the 20 tokens that are likeliest under full attention. With random weights, for which
a distant frame matters as much as a near one, it shows that the two masks differ, and says nothing
about accuracy: that is the first part's.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from demo_request import Answer, ask, check, num_blocks, serving, vocabulary_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # `support` lives there

from support.tiny import make_tiny_model
from support.video import video_data_url, write_video

VIDEO_SECONDS = 144
SAMPLED_FPS = 2.0  # what SGLang samples for Qwen's models
FRAME_SIZE = (392, 280)  # 140 tokens a step of two frames
WARM_UP_SECONDS = 24
LIKELIEST = 20
QUESTION = "What happens in the video?"
MODEL: dict[str, Any] = {
    "num_layers": 10,
    "hidden_size": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 256,
    "vision_depth": 1,
}


def run(work: Path, *, repeats: int, port: int | None) -> dict[str, Any]:
    """The second part, printed.

    Args:
        work: directory for the model, the videos and the server's log.
        repeats: runs of each.
        port: of the server; None takes a free one.

    Returns:
        Its figures.
    """
    model = make_tiny_model(work / "random_model", **MODEL)
    vocabulary = vocabulary_of(model)
    video, short = (
        video_data_url(
            write_video(work / f"{seconds}s.mp4", seconds=seconds, fps=SAMPLED_FPS, size=FRAME_SIZE)
        )
        for seconds in (VIDEO_SECONDS, WARM_UP_SECONDS)
    )
    print("starting the server of the ten-layer model ...", flush=True)
    runs: dict[bool, list[Answer]] = {True: [], False: []}
    with serving(model, work / "speed.log", port) as client:
        for pevlm in runs:
            ask(client, short, QUESTION, vocabulary=vocabulary, pevlm=pevlm)
        for repeat in range(repeats):
            for pevlm, answers in runs.items():
                answer = ask(client, video, QUESTION, vocabulary=vocabulary, pevlm=pevlm)
                answers.append(answer)
            check(runs[True][-1], runs[False][-1])
            print(
                f"run {repeat + 1} of {repeats}: full {runs[False][-1].ttft:.2f} s, "
                f"PEVLM {runs[True][-1].ttft:.2f} s",
                flush=True,
            )
        blocks = num_blocks(client, int(VIDEO_SECONDS * SAMPLED_FPS))
    return report(runs, blocks)


def logprob_difference(pevlm: Answer, full: Answer) -> float:
    """See the top of this file."""
    likeliest = sorted(full.logprobs, key=lambda token: -full.logprobs[token])[:LIKELIEST]
    return max(abs(full.logprobs[token] - pevlm.logprobs[token]) for token in likeliest)


def report(runs: dict[bool, list[Answer]], blocks: int) -> dict[str, Any]:
    """The table, and its figures."""
    pevlm, full = runs[True][-1], runs[False][-1]
    ttft = {kind: statistics.median(run.ttft for run in runs[kind]) for kind in runs}
    speedup = ttft[False] / ttft[True]
    difference = logprob_difference(pevlm, full)
    print(f"prompt: {pevlm.prompt_tokens} tokens, {blocks} context blocks\n")
    print(f"{'':16}{'visible_fraction':>17}{'time to first token':>21}")
    for name, kind, fraction in (
        ("full attention", False, full.work.visible_fraction),
        ("PEVLM", True, pevlm.work.visible_fraction),
    ):
        print(f"{name:16}{fraction:>17.3f}{ttft[kind]:>19.2f} s")
    print(f"\nspeed-up in time to first token: {speedup:.2f}x")
    print(f"largest difference of the answer's log-probs: {difference:.3f}\n")
    return {
        "prompt_tokens": pevlm.prompt_tokens,
        "blocks": blocks,
        "visible_fraction": round(pevlm.work.visible_fraction, 4),
        "ttft_full_s": round(ttft[False], 3),
        "ttft_pevlm_s": round(ttft[True], 3),
        "speedup_ttft": round(speedup, 3),
        "answer_logprob_diff": round(difference, 4),
    }
