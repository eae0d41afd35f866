"""Replicas of the model: the same answers, and all of them counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.exchange import SYSTEM, Exchange, Question, about, user
from support.oracle import Setting

Clip = Callable[..., Path]

pytestmark = pytest.mark.server
replicas = pytest.mark.parametrize("exchange", ["two_replicas"], indirect=True)


@replicas
@pytest.mark.parametrize("setting", [Setting(4, 4), Setting(0, 6), None])
def test_a_video(exchange: Exchange, clip: Clip, setting: Setting | None) -> None:
    exchange.flush()
    exchange.check(about(clip(10), setting=setting))


@replicas
def test_many_at_once(exchange: Exchange, clip: Clip) -> None:
    """Over both replicas, text between them."""
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
