"""The video that the model sees: resized as by qwen-vl-utils, and with the wishes of a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.exchange import SYSTEM, VIDEO, Exchange, Question, Sampled, about, user
from support.oracle import Setting
from support.video import write_video

Clip = Callable[..., Path]

pytestmark = pytest.mark.server
one_server = pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True)
two_models = pytest.mark.parametrize(
    "exchange", ["chunk_257", "qwen2_vl_retracting"], indirect=True
)


@pytest.fixture(scope="module")
def odd_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Neither its sides nor its frame rate come out even."""
    path = tmp_path_factory.mktemp("clips") / "odd.mp4"
    return write_video(path, seconds=12, fps=7.5, size=(202, 114), seed=5)


@two_models
@pytest.mark.parametrize(
    "wishes", [{}, {"fps": 1.5}, {"max_frames": 11}, {"max_pixels": 9000, "fps": 3}], ids=str
)
def test_resized_video(exchange: Exchange, odd_clip: Path, wishes: dict[str, Any]) -> None:
    exchange.check(about(Sampled(odd_clip, wishes), setting=Setting(4, 4)))


@one_server
def test_two_videos_with_knobs_of_their_own(exchange: Exchange, odd_clip: Path, clip: Clip) -> None:
    videos = (Sampled(odd_clip, {"fps": 1}), Sampled(clip(10), {"max_pixels": 5000}), clip(6))
    text = f"One: {VIDEO}two: {VIDEO}three: {VIDEO}which?"
    exchange.check(Question(SYSTEM + user(text), videos, setting=Setting(2, 4)))


@one_server
def test_other_knobs_are_no_prefix_hit(exchange: Exchange, odd_clip: Path) -> None:
    """The text before the video is shared, and nothing after it."""
    exchange.flush()
    first, other = (Sampled(odd_clip, {"max_frames": frames}) for frames in (12, 14))
    [answer] = exchange.check(about(first))
    end = answer.prompt_tokens - 1
    before_video = exchange.oracle.videos(exchange.inputs(about(first)))[0][0][0]
    for video, cached in ((other, before_video), (first, end)):
        [answer] = exchange.check(about(video, start=end))
        assert answer.cached_tokens == cached
