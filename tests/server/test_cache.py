"""The prefix cache: a hit gives what a fresh prefill gives, and settings never share keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.exchange import SHARP, SYSTEM, VIDEO, Exchange, about, user
from support.families.qwen_vl import FEW_PIXELS, reference_video
from support.oracle import Setting

Clip = Callable[..., Path]

pytestmark = pytest.mark.server
one_server = pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True)
servers = pytest.mark.parametrize(
    "exchange", ["chunk_257", "mixed_page_16", "triton", "two_ranks_retracting"], indirect=True
)


@servers
def test_hit_ends_in_a_block(exchange: Exchange, clip: Clip) -> None:
    """Blocks of two steps, 24 tokens: the hit ends at a block's start, in a step, between steps."""
    page_size = exchange.server.info()["page_size"]
    question = about(clip(10), setting=Setting(4, 4))
    exchange.flush()
    exchange.check(question)
    blocks = exchange.sparse_positions(question)[0]  # the first block sees everything before it
    offsets = set()
    for start in (blocks, blocks + 7, blocks + 24 + 12, blocks + 24 + 20, blocks + 48 + 23):
        [answer] = exchange.check(replace(question, start=start))
        assert answer.cached_tokens == start // page_size * page_size
        offsets.add((answer.cached_tokens - blocks) % 24)
    assert offsets - {0, 12}, "some hit ends inside a step"


@servers
def test_another_question(exchange: Exchange, clip: Clip) -> None:
    """The hit ends behind the video, or, rounded down to whole pages, in its last step."""
    page_size = exchange.server.info()["page_size"]
    first = about(clip(10), "Why?", setting=Setting(4, 4))
    video_end = exchange.sparse_positions(first)[-1] + 1
    filler = "z" * ((8 - video_end) % 16)  # a token each: the video ends 8 tokens into a page
    first, second = (
        replace(first, text=SYSTEM + user(filler + VIDEO + question)) for question in ("Why?", "Um")
    )
    exchange.flush()
    exchange.check(first)
    shared = exchange.sparse_positions(first)[-1] + 2  # up to <|vision_end|>
    assert shared % 16 == 9
    [answer] = exchange.check(replace(second, start=shared + 2))
    assert answer.cached_tokens == shared // page_size * page_size


@one_server
@pytest.mark.parametrize(
    "other", [Setting(2, 16), Setting(16, 2), Setting(16, 16, image_runs=True), None]
)
def test_settings_share_nothing(exchange: Exchange, clip: Clip, other: Setting | None) -> None:
    default = about(clip(30))
    exchange.flush()
    [answer] = exchange.check(default)
    end = answer.prompt_tokens - 1
    [overridden] = exchange.check(replace(default, setting=other, start=end))
    assert overridden.cached_tokens == 0
    for setting in (default.setting, other):
        [again] = exchange.check(replace(default, setting=setting, start=end))
        assert again.cached_tokens == end


@one_server
def test_frame_rate_is_part_of_a_video(exchange: Exchange, clip: Clip, tmp_path: Path) -> None:
    """The same frames at another rate have other positions, and so other keys."""
    slow, fast = (retimed(clip(10), tmp_path / f"{fps}.mp4", fps) for fps in (1, 2))
    first, second = (reference_video(video, FEW_PIXELS)[0] for video in (slow, fast))
    assert first.equal(second)
    questions = [about(video, setting=Setting(4, 4)) for video in (slow, fast)]
    exchange.flush()
    [answer, other] = [exchange.check(question)[0] for question in questions]
    assert (answer.logprobs - other.logprobs).abs().max() > SHARP
    exchange.flush()
    end = answer.prompt_tokens - 1
    before_video = exchange.oracle.videos(exchange.inputs(questions[0]))[0][0][0]
    for question, cached in ((questions[0], 0), (questions[1], before_video), (questions[0], end)):
        [answer] = exchange.check(replace(question, start=end))
        assert answer.cached_tokens == cached


def retimed(video: Path, path: Path, fps: float) -> Path:
    """All frames of a video at another rate, without loss. SGLang samples each of them where the
    rate is at most the two frames a second that it aims at."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.encoders import VideoEncoder

    frames = VideoDecoder(str(video))[:]
    VideoEncoder(frames, frame_rate=fps).to_file(
        path, codec="libx264", pixel_format="yuv420p", crf=0, preset="ultrafast"
    )
    return path
