"""The client against real servers: a request's work is its prompt's, for every family of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pevlm_sglang.tune.client import Client, ServerError
from support.exchange import Exchange

pytestmark = pytest.mark.server

SPARSE = {"sink_frames": 2, "block_frames": 4}
families = pytest.mark.parametrize(
    "exchange",
    ["mixed_page_16", "qwen2_vl_retracting", "qwen3_vl", "internvl", "llava_video", "longvila"],
    indirect=True,
)


@families
def test_measured_work(exchange: Exchange, clip: Callable[..., Path]) -> None:
    client = Client(exchange.server.url)
    video, question = clip(20), "What happens?"
    full, dense = client.measure(video, question, setting={"enabled": False}, max_tokens=3)
    assert dense.is_whole_prompt(full.prompt_tokens)
    assert (dense.pairs_saved, dense.visible_fraction) == (0, 1)
    for _ in range(2):  # nothing is left of the first
        answer, work = client.measure(video, question, setting=SPARSE, max_tokens=3, top_logprobs=2)
        assert work.is_whole_prompt(answer.prompt_tokens)
        assert work.pairs_saved > 0
        assert answer.prompt_tokens == full.prompt_tokens
        assert len(answer.tokens) <= 3  # a random model speaks in halves of characters
        assert all(token.logprob in token.top.values() for token in answer.tokens)
        assert answer.finish_reason == "length"
        assert 0 < answer.ttft < 60


@pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True)
def test_refusals(exchange: Exchange, clip: Callable[..., Path]) -> None:
    client = Client(exchange.server.url)
    with pytest.raises(ServerError, match="unknown option 'sink'; valid options: enabled"):
        client.ask(clip(6), "What?", setting={"sink": 2})
    with pytest.raises(ServerError, match="Could not decode video"):
        client.ask("file:///none.mp4", "What?")
