"""The demo's server, and one request as the client and the server's counters saw it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from openai_api import about, connect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # `support` lives there

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
        pairs_computed, pairs_saved: what the request added to the server's counters.
    """

    text: str
    ended: bool
    ttft: float
    prompt_tokens: int
    logprobs: dict[bytes, float]
    pairs_computed: int
    pairs_saved: int

    @property
    def visible_fraction(self) -> float:
        return self.pairs_computed / (self.pairs_computed + self.pairs_saved)


@contextmanager
def serving(
    model: Path, log: Path, port: int | None, *flags: str
) -> Iterator[tuple[Server, openai.OpenAI]]:
    """A server with PEVLM, and a client of its OpenAI API. It prefills in one chunk and encodes
    every video anew; see ``demo_speed.py`` for why.

    Args:
        log: file of its output.
        port: None takes a free one.
        flags: further ones.
    """
    fixed = ("--attention-backend", "pevlm", "--chunked-prefill-size", "-1")
    env = {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
    with Server(model, *fixed, *flags, env=env, log_path=log, port=port) as server:
        yield server, connect(server.url)


def ask(
    server: Server,
    client: openai.OpenAI,
    video: str,
    question: str,
    *,
    vocabulary: int,
    pevlm: bool,
) -> Answer:
    """One streamed, greedy request on empty caches.

    Args:
        client: of the server's OpenAI API.
        video: as a ``data:`` URL.
        vocabulary: the model's number of tokens, for the log-probs of all.
        pevlm: False asks for full attention.
    """
    flushed = server.post("/flush_cache?timeout=10")
    if flushed.status_code != 200:
        sys.exit(f"demo: /flush_cache: expected HTTP 200, got {flushed.status_code}")
    before = counters(server)
    start = time.perf_counter()
    stream = client.chat.completions.create(
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
    after = counters(server)
    return Answer(
        text,
        ended,
        ttft,
        prompt_tokens,
        logprobs,
        after["pairs_computed"] - before["pairs_computed"],
        after["pairs_saved"] - before["pairs_saved"],
    )


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


def counters(server: Server) -> dict[str, Any]:
    """PEVLM's totals in the scheduler."""
    totals: dict[str, Any] = server.info()["internal_states"][0]["pevlm"]
    return totals


def num_blocks(server: Server, sampled_frames: int) -> int:
    """Context blocks of a video, by the server's own configuration."""
    config = server.info()["pevlm"]
    frames_per_step = config["frames_per_step"]
    sink, block = (-(-config[name] // frames_per_step) for name in ("sink_frames", "block_frames"))
    steps = sampled_frames // frames_per_step
    return -(-(steps - sink) // int(block))


def vocabulary_of(model: Path) -> int:
    """A model's number of tokens."""
    config = json.loads((model / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])
