"""The demo's server, and one request as the client and the server's counters saw it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # `support` lives there

from pevlm_sglang.tune.client import Client, Work, about
from support.server import Server

MAX_TOKENS = 4


@dataclass(frozen=True)
class Answer:
    """One request on empty caches.

    Attributes:
        text: of the answer, up to ``MAX_TOKENS`` tokens.
        ended: whether the model ended its answer.
        ttft: seconds from sending the request to its first token.
        prompt_tokens: of the expanded prompt.
        logprobs: of the first answer token, by the bytes of the token.
        work: what the request added to the server's counters.
    """

    text: str
    ended: bool
    ttft: float
    prompt_tokens: int
    logprobs: dict[bytes, float]
    work: Work


@contextmanager
def serving(model: Path, log: Path, port: int | None, *flags: str) -> Iterator[Client]:
    """A client of a server with PEVLM, which prefills in one chunk and encodes
    every video anew; see ``demo_speed.py`` for why.

    Args:
        log: file of its output.
        port: None takes a free one.
        flags: further ones.
    """
    fixed = ("--attention-backend", "pevlm", "--chunked-prefill-size", "-1")
    env = {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
    with Server(model, *fixed, *flags, env=env, log_path=log, port=port) as server:
        yield Client(server.url)


def ask(client: Client, video: str, question: str, *, vocabulary: int, pevlm: bool) -> Answer:
    """One streamed, greedy request on empty caches.

    Args:
        video: as a ``data:`` URL.
        vocabulary: the model's number of tokens, for the log-probs of all.
        pevlm: False asks for full attention.
    """
    client.flush()
    before = client.counters()
    start = time.perf_counter()
    stream = client.api.chat.completions.create(
        model="tiny",
        messages=about({"url": video}, question),
        max_tokens=MAX_TOKENS,
        temperature=0,
        logprobs=True,
        top_logprobs=vocabulary,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"custom_params": {"pevlm": {"enabled": pevlm}}},
    )
    text, ended, ttft, prompt_tokens = "", False, 0.0, 0
    logprobs: dict[bytes, float] = {}
    for chunk in stream:
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            ended |= choice.finish_reason == "stop"
            if choice.logprobs and choice.logprobs.content and not logprobs:
                ttft = time.perf_counter() - start
                tokens = choice.logprobs.content[0].top_logprobs
                # The ids beyond the tokenizer's have no bytes to tell them apart.
                logprobs = {bytes(token.bytes): token.logprob for token in tokens if token.bytes}
    if not logprobs or not prompt_tokens:
        sys.exit("demo: expected a streamed answer with log-probs and usage, got none")
    return Answer(text, ended, ttft, prompt_tokens, logprobs, client.counters().since(before))


def check(pevlm: Answer, full: Answer) -> None:
    """End with an error unless each ran what it was asked to run, on empty caches."""
    if not pevlm.work.pairs_saved:
        sys.exit(
            "demo: PEVLM was not active: expected saved attention pairs in /server_info, got 0; "
            "see the reasons under dense_tokens there, and the server's log"
        )
    if full.work.pairs_saved:
        sys.exit(
            "demo: the baseline was not full attention: expected no saved attention pairs, "
            f"got {full.work.pairs_saved}"
        )
    for answer in (pevlm, full):
        if not answer.work.is_whole_prompt(answer.prompt_tokens):
            sys.exit(
                f"demo: expected a prefill of the whole prompt, {answer.prompt_tokens} tokens, got "
                f"{answer.work}; a cache served part of it"
            )


def num_blocks(client: Client, sampled_frames: int) -> int:
    """Context blocks of a video, by the server's own configuration."""
    config = client.config()
    frames_per_step = config["frames_per_step"]
    sink, block = (-(-config[name] // frames_per_step) for name in ("sink_frames", "block_frames"))
    steps = sampled_frames // frames_per_step
    return -(-(steps - sink) // int(block))


def vocabulary_of(model: Path) -> int:
    """A model's number of tokens."""
    config = json.loads((model / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])
