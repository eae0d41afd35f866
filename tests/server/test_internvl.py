"""InternVL3.5 on the real server: log-probabilities against the reference under the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.exchange import SHARP, SYSTEM, Exchange, Question, user
from support.families.internvl import IMAGE, VIDEO
from support.oracle import Setting

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = pytest.mark.server
dense = pytest.mark.parametrize("exchange", ["internvl"], indirect=True)
both = pytest.mark.parametrize("exchange", ["internvl", "internvl_moe"], indirect=True)


def about(video: Path, text: str = "What happens?", **fields: object) -> Question:
    return Question(SYSTEM + user(VIDEO + text), (video,), **fields)  # type: ignore[arg-type]


@both
@pytest.mark.parametrize("setting", [Setting(2, 2), Setting(0, 3), Setting(3, 5), None])
def test_sizes(exchange: Exchange, clip: Clip, setting: Setting | None) -> None:
    exchange.check(about(clip(8), setting=setting))
