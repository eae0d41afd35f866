"""Replicas and pipeline stages of the model: the same answers, and all of them counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.exchange import IMAGE, SHARP, SYSTEM, VIDEO, Exchange, Question, about, user
from support.oracle import Setting

Clip = Callable[..., Path]

pytestmark = pytest.mark.server
parallel = pytest.mark.parametrize("exchange", ["two_replicas", "two_stages"], indirect=True)
replicas = pytest.mark.parametrize("exchange", ["two_replicas"], indirect=True)


@parallel
@pytest.mark.parametrize("setting", [Setting(4, 4), Setting(0, 6), None])
def test_a_video(exchange: Exchange, clip: Clip, setting: Setting | None) -> None:
    exchange.flush()
    exchange.check(about(clip(10), setting=setting))


@parallel
def test_many_at_once(exchange: Exchange, clip: Clip) -> None:
    """Over both, text between them."""
    exchange.flush()
    videos = [about(clip(seconds), setting=Setting(4, 4)) for seconds in (10, 14, 22, 30)]
    exchange.check(*videos, Question(SYSTEM + user("Why?")))
    exchange.check(*videos)  # on prefix hits, wherever each request goes


@replicas
def test_every_replica_reports(exchange: Exchange, clip: Clip) -> None:
    info = exchange.server.info()
    assert len(info["internal_states"]) == 2
    assert all("pevlm" in state for state in info["internal_states"])
    exchange.flush()
    exchange.ask(*(about(clip(10, seed), setting=Setting(4, 4)) for seed in range(20, 28)))
    states = exchange.server.info()["internal_states"]
    assert all(state["pevlm"]["sparse_tokens"] > 0 for state in states), "both served some"


stages = pytest.mark.parametrize("exchange", ["two_stages"], indirect=True)


@stages
def test_a_video_in_chunks(exchange: Exchange, clip: Clip) -> None:
    """The first stage computes a chunk while the second has the one before; then a prefix is hit,
    in the middle of a block."""
    exchange.flush()
    question = about(clip(40), setting=Setting(4, 6))
    [answer] = exchange.check(question)
    assert answer.prompt_tokens > 3 * 131
    [answer] = exchange.check(replace(question, start=answer.prompt_tokens // 2))
    assert answer.cached_tokens == answer.prompt_tokens // 2
    [answer] = exchange.check(about(clip(40), "And then?", setting=Setting(4, 6), start=400))
    assert answer.cached_tokens == 400


@stages
def test_videos_and_pictures(
    exchange: Exchange, clip: Clip, picture: Callable[[int], Path]
) -> None:
    exchange.flush()
    text = SYSTEM + user(f"One: {VIDEO}two: {VIDEO}beside {IMAGE}which is longer?")
    videos = clip(10), clip(22, seed=1)
    for setting in (Setting(2, 4), None):
        exchange.check(Question(text, videos, (picture(0),), setting))


@stages
def test_another_mask_would_show(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(30), setting=Setting(4, 4))
    [answer] = exchange.check(question)
    for wrong in (None, Setting(2, 4), Setting(6, 4), Setting(4, 2), Setting(4, 6)):
        assert exchange.difference(question, answer, wrong) > SHARP, wrong


@stages
def test_the_first_stage_speaks_for_both(exchange: Exchange) -> None:
    info = exchange.server.info()
    assert info["pp_size"] == 2
    assert len(info["internal_states"]) == 1
    assert info["pevlm"]["prefill_kernel"] == "sdpa"
