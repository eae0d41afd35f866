"""A LongVILA server's log-probabilities against the model in plain PyTorch under the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.exchange import SHARP, SYSTEM, Exchange, Question, user
from support.families.longvila import IMAGE, NUM_FRAMES, TOKENS_PER_FRAME, VIDEO
from support.oracle import Setting
from support.video import video_data_url

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = [
    pytest.mark.server,
    pytest.mark.parametrize("exchange", ["longvila"], indirect=True),
]

STEP = TOKENS_PER_FRAME + 1  # and the newline


def about(video: Path, **fields: Any) -> Question:
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


def test_switched_off(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(30), setting=None)
    [answer] = exchange.check(question)
    assert exchange.difference(question, answer, Setting(16, 16)) > SHARP


def test_no_more_frames_than_a_sink_and_a_block_is_dense(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(6), setting=Setting(16, NUM_FRAMES - 16))
    [answer] = exchange.check(question)
    assert not exchange.sparse_positions(question)
    exchange.compare([about(clip(6), setting=None)], [answer])


@pytest.mark.parametrize("setting", [Setting(4, 4), Setting(0, 7), None])
def test_two_videos_and_text_around(
    exchange: Exchange, clip: Clip, setting: Setting | None
) -> None:
    text = f"One: {VIDEO}then, after a while, {VIDEO}which is longer?"
    exchange.check(Question(SYSTEM + user(text), (clip(10), clip(14, seed=1)), setting=setting))


@pytest.mark.parametrize("order", [(VIDEO, IMAGE), (IMAGE, VIDEO, IMAGE)])
def test_image_beside_a_video(
    exchange: Exchange, clip: Clip, picture: Picture, order: tuple[str, ...]
) -> None:
    images = tuple(picture(i) for i in range(order.count(IMAGE)))
    text = SYSTEM + user(" and ".join(order) + "?")
    exchange.check(Question(text, (clip(14),), images, Setting(4, 4)))


def test_image_run(exchange: Exchange, picture: Picture) -> None:
    """The newline after an image is the image's, as that after a frame is the frame's."""
    pictures = tuple(picture(i) for i in range(9))
    text = "Look: " + "".join(f"{IMAGE}is number {i}. " for i in range(9)) + "Which is best?"
    question = Question(SYSTEM + user(text), images=pictures, setting=Setting(2, 2, True))
    [answer] = exchange.check(question)
    assert len(exchange.sparse_positions(question)) == 5 * STEP  # a run's first block is dense
    assert exchange.difference(question, answer, None) > SHARP


def test_prefix_that_ends_inside_a_block(exchange: Exchange, clip: Clip) -> None:
    """And inside a frame; the last frame but one is in the block's first half."""
    exchange.flush()
    question = about(clip(30), setting=Setting(4, 8))
    exchange.check(question)
    start = len(exchange.oracle.tokenizer(SYSTEM).input_ids) + 17 * STEP + 4  # type: ignore[attr-defined]
    [answer] = exchange.check(replace(question, start=start))
    assert answer.cached_tokens == start


def test_second_turn(exchange: Exchange, clip: Clip) -> None:
    """The first turn is in the cache, video and answer, when the second brings another video."""
    exchange.flush()
    first = about(clip(12), setting=Setting(4, 4), new_tokens=6)
    [answer] = exchange.check(first)
    turn = first.text + answer.text + "<|im_end|>\n" + user(VIDEO + "And in this?")
    videos = (*first.videos, clip(10, seed=1))
    second = Question(turn, videos, setting=Setting(4, 4), start=answer.prompt_tokens)
    [again] = exchange.check(second)
    assert again.cached_tokens == answer.prompt_tokens


def test_batch(exchange: Exchange, clip: Clip) -> None:
    exchange.check(
        about(clip(30), setting=Setting(4, 4)),
        Question(SYSTEM + user("Hello.")),
        about(clip(10, seed=1), setting=None),
    )


def test_chat(exchange: Exchange, clip: Clip) -> None:
    """``video_url`` in a chat, with wishes; text that looks like a placeholder is none."""
    text = {"type": "text", "text": " What <image> happens? "}

    def ask(**wishes: Any) -> dict[str, Any]:
        url = {"url": video_data_url(clip(30)), **wishes}
        return exchange.server.chat([{"type": "video_url", "video_url": url}, text], max_tokens=3)

    prompt = SYSTEM + user(VIDEO + " What  happens?")
    inputs = exchange.oracle.inputs(prompt, (clip(30),))
    length = inputs["input_ids"].shape[1]
    assert ask()["usage"]["prompt_tokens"] == length
    assert ask(max_frames=7)["usage"]["prompt_tokens"] == length - (NUM_FRAMES - 7) * STEP
    assert ask(fps=1.0)["usage"]["prompt_tokens"] == length - (NUM_FRAMES - 30) * STEP


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_frames": 61}, "max_frames: expected at most 60, the server's limit, got 61"),
        ({"max_frames": 0}, "max_frames: expected a whole number of more than 0, got 0"),
        ({"fps": -1}, "fps: expected a number of more than 0, got -1"),
        ({"max_pixels": 3136}, "max_pixels: expected one of fps, max_frames for this model"),
    ],
)
def test_bad_wishes(exchange: Exchange, clip: Clip, wishes: dict[str, Any], message: str) -> None:
    """On ``/generate``: a chat's own checks of such values come before this plugin's."""
    body = {
        "text": VIDEO,
        "video_data": [{"url": str(clip(30)), **wishes}],
        "sampling_params": {"max_new_tokens": 1},
    }
    response = exchange.server.post("/generate", body)
    assert response.status_code == 400, response.text[:500]
    assert message in response.text
    assert exchange.server.alive()
