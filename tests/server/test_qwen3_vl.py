"""Qwen3-VL and Qwen3-VL-MoE: a server's log-probabilities against Hugging Face's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.exchange import Exchange, about
from support.oracle import Setting

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = pytest.mark.server
dense = pytest.mark.parametrize("exchange", ["qwen3_vl"], indirect=True)


@dense
@pytest.mark.parametrize(
    "setting", [Setting(16, 16), Setting(3, 5), Setting(0, 2), Setting(0, 5), Setting(2, 16), None]
)
def test_sizes(exchange: Exchange, clip: Clip, setting: Setting | None) -> None:
    exchange.check(about(clip(30), setting=setting))


@pytest.mark.parametrize("exchange", ["qwen3_vl_moe"], indirect=True)
@pytest.mark.parametrize("setting", [Setting(16, 16), Setting(3, 5), Setting(0, 2), None])
def test_experts(exchange: Exchange, clip: Clip, setting: Setting | None) -> None:
    exchange.check(about(clip(30), setting=setting))
