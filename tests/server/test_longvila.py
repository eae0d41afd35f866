"""A LongVILA server's log-probabilities against the model in plain PyTorch under the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.exchange import SHARP, SYSTEM, Exchange, Question, user
from support.families.longvila import VIDEO
from support.oracle import Setting

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = [
    pytest.mark.server,
    pytest.mark.parametrize("exchange", ["longvila"], indirect=True),
]


def about(video: Path, **fields: object) -> Question:
    return Question(SYSTEM + user(VIDEO + "What happens in the video?"), (video,), **fields)


@pytest.mark.parametrize("sink_frames", [0, 1, 3, 16])
@pytest.mark.parametrize("block_frames", [1, 5, 16])
def test_sizes(exchange: Exchange, clip: Clip, sink_frames: int, block_frames: int) -> None:
    exchange.check(about(clip(30), setting=Setting(sink_frames, block_frames)))


def test_another_mask_would_show(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(30), setting=Setting(4, 4))
    [answer] = exchange.check(question)
    for wrong in (None, Setting(3, 4), Setting(5, 4), Setting(4, 3), Setting(4, 5)):
        assert exchange.difference(question, answer, wrong) > SHARP, wrong
