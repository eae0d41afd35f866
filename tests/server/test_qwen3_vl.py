"""Qwen3-VL and Qwen3-VL-MoE: a server's log-probabilities against Hugging Face's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.exchange import IMAGE, SHARP, SYSTEM, VIDEO, Exchange, Question, about, user
from support.oracle import Setting
from support.video import video_data_url, write_video

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

BARE = "<|video_pad|>"  # a video without the chat template's wrapper

pytestmark = pytest.mark.server
dense = pytest.mark.parametrize("exchange", ["qwen3_vl"], indirect=True)
experts = pytest.mark.parametrize("exchange", ["qwen3_vl_moe"], indirect=True)
both = pytest.mark.parametrize("exchange", ["qwen3_vl", "qwen3_vl_moe"], indirect=True)


@dense
@pytest.mark.parametrize("sink_frames", [0, 3, 16])
@pytest.mark.parametrize("block_frames", [2, 5, 16])
def test_sizes(exchange: Exchange, clip: Clip, sink_frames: int, block_frames: int) -> None:
    exchange.check(about(clip(30), setting=Setting(sink_frames, block_frames)))


@experts
@pytest.mark.parametrize("setting", [Setting(16, 16), Setting(3, 5), Setting(0, 2)])
def test_sizes_with_experts(exchange: Exchange, clip: Clip, setting: Setting) -> None:
    exchange.check(about(clip(30), setting=setting))


@both
def test_switched_off(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(30), setting=None)
    [answer] = exchange.check(question)
    assert exchange.difference(question, answer, Setting(16, 16)) > SHARP


@both
def test_another_mask_would_show(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(30), setting=Setting(4, 4))
    [answer] = exchange.check(question)
    for wrong in (None, Setting(2, 4), Setting(6, 4), Setting(4, 2), Setting(4, 6)):
        assert exchange.difference(question, answer, wrong) > SHARP, wrong


@dense
def test_a_token_on_the_wrong_side_would_show(exchange: Exchange, clip: Clip) -> None:
    """Steps that end before ``<|vision_end|>``, and steps that begin six tokens late, behind their
    timestamp: both tile a video, and both are wrong."""
    question = about(clip(30), setting=Setting(4, 4))
    [answer] = exchange.check(question)
    find = exchange.oracle.videos
    for shift in (-1, 6):
        exchange.oracle.videos = lambda inputs, shift=shift: [
            [(start + shift, end + shift) for start, end in video] for video in find(inputs)
        ]
        assert exchange.difference(question, answer, question.setting) > SHARP
    del exchange.oracle.videos


@dense
def test_short_video_is_dense(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(6), setting=Setting(4, 8))  # sink and one block hold its 6 steps
    [answer] = exchange.check(question)
    assert not exchange.sparse_positions(question)
    exchange.compare([about(clip(6), setting=None)], [answer])


@both
def test_hit_ends_in_a_block(exchange: Exchange, clip: Clip) -> None:
    """At a block's start, in a timestamp, in a step's placeholders, between steps."""
    question = about(clip(10), setting=Setting(4, 4))
    exchange.flush()
    exchange.check(question)
    blocks = exchange.sparse_positions(question)[0]  # the first block sees everything before it
    [steps] = exchange.oracle.videos(exchange.inputs(question))
    starts = [start for start, _ in steps if start >= blocks]
    for start in (starts[0], starts[1] + 3, starts[2] + 15, starts[3]):
        [answer] = exchange.check(replace(question, start=start))
        assert answer.cached_tokens == start


@both
@pytest.mark.parametrize("setting", [Setting(4, 4), Setting(0, 6)])
def test_two_videos_and_text_around(exchange: Exchange, clip: Clip, setting: Setting) -> None:
    text = f"One: {VIDEO}then, after a while, {VIDEO}which is longer?"
    videos = (clip(10), clip(14, seed=1))
    exchange.check(Question(SYSTEM + user(text), videos, setting=setting))


@dense
@pytest.mark.parametrize(
    "text", ["", VIDEO + VIDEO, BARE + BARE, f"yes.{BARE}no", f"<9.7 seconds>{BARE}{VIDEO}"]
)
def test_text_beside_a_video(exchange: Exchange, clip: Clip, text: str) -> None:
    """No text at all, adjacent videos, and text that shares a token with the first timestamp."""
    text = text or VIDEO
    videos = (clip(10), clip(8, seed=1))[: text.count(BARE)]
    questions = [
        Question(text, videos, setting=Setting(4, 4)),
        Question(SYSTEM + user(text), videos, setting=Setting(4, 4)),
    ]
    exchange.check(*questions)


@dense
@pytest.mark.parametrize("order", [(VIDEO, IMAGE), (IMAGE, VIDEO), (IMAGE, BARE, IMAGE)])
def test_image_beside_a_video(
    exchange: Exchange, clip: Clip, picture: Picture, order: tuple[str, ...]
) -> None:
    images = tuple(picture(i) for i in range(order.count(IMAGE)))
    text = SYSTEM + user(" and ".join(order) + "?")
    exchange.check(Question(text, (clip(14),), images, Setting(4, 4)))


@dense
def test_image_run_beside_a_video(exchange: Exchange, clip: Clip, picture: Picture) -> None:
    """Two sampled frames a step in the video, one in the run."""
    images = tuple(picture(i) for i in range(5))
    text = VIDEO + "z" * 40 + 5 * IMAGE
    exchange.check(Question(SYSTEM + user(text), (clip(10),), images, setting=Setting(3, 2, True)))


@dense
def test_second_turn(exchange: Exchange, clip: Clip) -> None:
    """The first turn is in the cache, its answer included, when the second follows."""
    exchange.flush()
    first = about(clip(12), setting=Setting(4, 4), new_tokens=6)
    [answer] = exchange.check(first)
    turn = first.text + answer.text + "<|im_end|>\n"
    videos = (*first.videos, clip(10, seed=1))
    again = Question(turn + user(VIDEO + "And in this?"), videos, setting=Setting(4, 4))
    [second] = exchange.check(replace(again, start=answer.prompt_tokens))
    assert second.cached_tokens == answer.prompt_tokens


@dense
def test_batch(exchange: Exchange, clip: Clip) -> None:
    exchange.flush()
    exchange.check(
        about(clip(10), setting=Setting(2, 4)),
        Question(SYSTEM + user("Hello?"), setting=Setting(2, 4)),
        about(clip(20, seed=2), setting=None),
        about(clip(12, seed=3), "Why?", setting=Setting(0, 2)),
    )


@dense
@pytest.mark.parametrize(("size", "seconds"), [((84, 112), 9), ((224, 84), 6.5), ((56, 56), 50)])
def test_portrait_landscape_and_long(
    exchange: Exchange, tmp_path: Path, size: tuple[int, int], seconds: float
) -> None:
    """The timestamps of the longest need one more character from the tenth second on."""
    video = write_video(tmp_path / "clip.mp4", seconds=seconds, size=size, fps=3)
    exchange.check(about(video, setting=Setting(2, 6)))


@dense
def test_chat(exchange: Exchange, clip: Clip) -> None:
    """A ``video_url``, with the chat template of the server."""
    before = exchange.totals()["sparse_tokens"]
    exchange.flush()
    content = [
        {"type": "video_url", "video_url": {"url": video_data_url(clip(10))}},
        {"type": "text", "text": "What happens in the video?"},
    ]
    override = {"pevlm": {"sink_frames": 4, "block_frames": 4}}
    exchange.server.chat(content, max_tokens=2, custom_params=override)
    sparse = exchange.sparse_positions(about(clip(10), setting=Setting(4, 4)))
    assert exchange.totals()["sparse_tokens"] - before == len(sparse)
