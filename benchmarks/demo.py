"""The main job on a machine without a GPU: ask a real server about a video, with and without PEVLM.

    make demo

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
about accuracy.

Sample output, on a virtual machine that others were using too (the last line is cut here):

    pevlm-sglang 0.1.0, sglang 0.5.23, torch 2.14.1, Python 3.11.7
    AMD EPYC, 2 cores, load 1.8
    starting the SGLang server on the CPU (about a minute) ...
    run 1 of 3: full 19.52 s, PEVLM 10.35 s
    run 2 of 3: full 28.21 s, PEVLM 12.18 s
    run 3 of 3: full 28.51 s, PEVLM 10.41 s
    prompt: 20191 tokens, 17 context blocks

                     visible_fraction  time to first token
    full attention              1.000              28.21 s
    PEVLM                       0.163              10.41 s

    speed-up in time to first token: 2.71x
    largest difference of the answer's log-probs: 0.693

    {"prompt_tokens": 20191, "blocks": 17, "visible_fraction": 0.1631,
     "ttft_full_s": 28.212, "ttft_pevlm_s": 10.405, "speedup_ttft": 2.711,
     "answer_logprob_diff": 0.6932}
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from machine import card, summary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # `support` lives there


from support.server import Server
from support.tiny import make_tiny_model
from support.video import video_data_url, write_video

WORK_DIR = Path(__file__).resolve().parent.parent / ".cache" / "demo"
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


@dataclass(frozen=True)
class Answer:
    """One request, as the client and the server's counters saw it.

    Attributes:
        ttft: seconds from sending the request to its first token.
        prompt_tokens: of the expanded prompt.
        logprobs: of the first answer token, by the bytes of the token.
        pairs_computed, pairs_saved: what the request added to the server's counters.
    """

    ttft: float
    prompt_tokens: int
    logprobs: dict[bytes, float]
    pairs_computed: int
    pairs_saved: int

    @property
    def visible_fraction(self) -> float:
        return self.pairs_computed / (self.pairs_computed + self.pairs_saved)


def ask(
    server: Server, client: openai.OpenAI, video: str, *, vocabulary: int, pevlm: bool
) -> Answer:
    """One streamed request on empty caches.

    Args:
        video: as a ``data:`` URL.
        vocabulary: the model's number of tokens, for the log-probs of all.
        pevlm: False asks for full attention.
    """
    flushed = server.post("/flush_cache?timeout=10")
    if flushed.status_code != 200:
        sys.exit(f"demo: /flush_cache: expected HTTP 200, got {flushed.status_code}")
    content: Any = [  # the client has no type for `video_url`, an extension of SGLang
        {"type": "video_url", "video_url": {"url": video}},
        {"type": "text", "text": QUESTION},
    ]
    before = counters(server)
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=vocabulary,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"custom_params": {"pevlm": {"enabled": pevlm}}},
    )
    ttft, prompt_tokens = 0.0, 0
    logprobs: dict[bytes, float] = {}
    for chunk in stream:
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
        first = chunk.choices[0].logprobs if chunk.choices and not logprobs else None
        if first and first.content:
            ttft = time.perf_counter() - start
            tokens = first.content[0].top_logprobs
            # The ids beyond the tokenizer's have no bytes to tell them apart.
            logprobs = {bytes(token.bytes): token.logprob for token in tokens if token.bytes}
    if not logprobs or not prompt_tokens:
        sys.exit("demo: expected a streamed answer with log-probs and usage, got none")
    after = counters(server)
    return Answer(
        ttft,
        prompt_tokens,
        logprobs,
        after["pairs_computed"] - before["pairs_computed"],
        after["pairs_saved"] - before["pairs_saved"],
    )


def counters(server: Server) -> dict[str, Any]:
    """PEVLM's totals in the scheduler."""
    totals: dict[str, Any] = server.info()["internal_states"][0]["pevlm"]
    return totals


def check(pevlm: Answer, full: Answer) -> None:
    """End with an error unless each ran what it was asked to run, on empty caches."""
    if not pevlm.pairs_saved:
        sys.exit(
            "demo: PEVLM was not active: expected saved attention pairs in /server_info, got 0; "
            "see the reasons under dense_tokens there, and the server's log"
        )
    if full.pairs_saved:
        sys.exit(
            "demo: the baseline was not full attention: expected no saved attention pairs, "
            f"got {full.pairs_saved}"
        )
    for answer in (pevlm, full):
        pairs = answer.prompt_tokens * (answer.prompt_tokens + 1) // 2
        if answer.pairs_computed + answer.pairs_saved != pairs:
            sys.exit(
                f"demo: expected a prefill of the whole prompt, {pairs} attention pairs, got "
                f"{answer.pairs_computed + answer.pairs_saved}; a cache served part of it"
            )


def logprob_difference(pevlm: Answer, full: Answer) -> float:
    """See the top of this file."""
    likeliest = sorted(full.logprobs, key=lambda token: -full.logprobs[token])[:LIKELIEST]
    return max(abs(full.logprobs[token] - pevlm.logprobs[token]) for token in likeliest)


def num_blocks(server: Server) -> int:
    """Context blocks of the video, by the server's own configuration."""
    config = server.info()["pevlm"]
    frames_per_step = config["frames_per_step"]
    sink, block = (-(-config[name] // frames_per_step) for name in ("sink_frames", "block_frames"))
    steps = int(VIDEO_SECONDS * SAMPLED_FPS) // frames_per_step
    return -(-(steps - sink) // int(block))


def report(runs: dict[bool, list[Answer]], blocks: int) -> None:
    """The table, and the figures as one JSON object in the last line."""
    pevlm, full = runs[True][-1], runs[False][-1]
    ttft = {kind: statistics.median(run.ttft for run in runs[kind]) for kind in runs}
    speedup = ttft[False] / ttft[True]
    difference = logprob_difference(pevlm, full)
    print(f"prompt: {pevlm.prompt_tokens} tokens, {blocks} context blocks\n")
    print(f"{'':16}{'visible_fraction':>17}{'time to first token':>21}")
    for name, kind, fraction in (
        ("full attention", False, full.visible_fraction),
        ("PEVLM", True, pevlm.visible_fraction),
    ):
        print(f"{name:16}{fraction:>17.3f}{ttft[kind]:>19.2f} s")
    print(f"\nspeed-up in time to first token: {speedup:.2f}x")
    print(f"largest difference of the answer's log-probs: {difference:.3f}\n")
    print(
        json.dumps(
            {
                "prompt_tokens": pevlm.prompt_tokens,
                "blocks": blocks,
                "visible_fraction": round(pevlm.visible_fraction, 4),
                "ttft_full_s": round(ttft[False], 3),
                "ttft_pevlm_s": round(ttft[True], 3),
                "speedup_ttft": round(speedup, 3),
                "answer_logprob_diff": round(difference, 4),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="PEVLM beside full attention on a CPU server")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--port", type=int, help="of the server (default: a free one)")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        help="for model, videos and the server's log (default: .cache/demo)",
    )
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats: expected >= 1, got {options.repeats}")
    work: Path = options.work_dir

    print(summary(card(torch.device("cpu"))), flush=True)
    model = make_tiny_model(work / "model", **MODEL)
    model_config = json.loads((model / "config.json").read_text())
    vocabulary = int(model_config["text_config"]["vocab_size"])
    video, short = (
        video_data_url(
            write_video(work / f"{seconds}s.mp4", seconds=seconds, fps=SAMPLED_FPS, size=FRAME_SIZE)
        )
        for seconds in (VIDEO_SECONDS, WARM_UP_SECONDS)
    )
    print("starting the SGLang server on the CPU (about a minute) ...", flush=True)
    runs: dict[bool, list[Answer]] = {True: [], False: []}
    with Server(
        model,
        *("--attention-backend", "pevlm", "--chunked-prefill-size", "-1"),
        env={"SGLANG_VLM_CACHE_SIZE_MB": "0"},
        log_path=work / "server.log",
        port=options.port,
    ) as server:
        client = openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )
        for pevlm in runs:
            ask(server, client, short, vocabulary=vocabulary, pevlm=pevlm)
        for repeat in range(options.repeats):
            for pevlm, answers in runs.items():
                answers.append(ask(server, client, video, vocabulary=vocabulary, pevlm=pevlm))
            check(runs[True][-1], runs[False][-1])
            print(
                f"run {repeat + 1} of {options.repeats}: full {runs[False][-1].ttft:.2f} s, "
                f"PEVLM {runs[True][-1].ttft:.2f} s",
                flush=True,
            )
        blocks = num_blocks(server)
    report(runs, blocks)


if __name__ == "__main__":
    main()
