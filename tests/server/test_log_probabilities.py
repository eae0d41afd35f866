"""A server's log-probabilities, of prompt and answer, against Hugging Face under the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.exchange import IMAGE, SHARP, SYSTEM, VIDEO, Exchange, Question, about, user
from support.oracle import Setting

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = pytest.mark.server
one_server = pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True)


@pytest.mark.parametrize("exchange", ["chunk_257", "mixed_page_16", "one_chunk"], indirect=True)
@pytest.mark.parametrize("sink_frames", [0, 2, 3, 16])
@pytest.mark.parametrize("block_frames", [2, 5, 16])
def test_sizes(exchange: Exchange, clip: Clip, sink_frames: int, block_frames: int) -> None:
    exchange.check(about(clip(30), setting=Setting(sink_frames, block_frames)))


@pytest.mark.parametrize("exchange", ["qwen2_vl_retracting", "two_ranks_retracting"], indirect=True)
@pytest.mark.parametrize("setting", [Setting(16, 16), Setting(3, 5), Setting(0, 2), None])
def test_model_and_ranks(exchange: Exchange, clip: Clip, setting: Setting | None) -> None:
    exchange.check(about(clip(30), setting=setting))


@pytest.mark.parametrize("exchange", ["triton"], indirect=True)
@pytest.mark.parametrize("setting", [Setting(2, 2), Setting(0, 5), None])
def test_triton(exchange: Exchange, clip: Clip, setting: Setting | None) -> None:
    assert exchange.server.info()["pevlm"]["prefill_kernel"] == "triton"  # PEVLM's own
    exchange.check(about(clip(10), setting=setting))


@pytest.mark.parametrize("exchange", ["chunk_257", "one_chunk"], indirect=True)
def test_another_mask_would_show(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(30), setting=Setting(4, 4))
    [answer] = exchange.check(question)
    for wrong in (None, Setting(2, 4), Setting(6, 4), Setting(4, 2), Setting(4, 6)):
        assert exchange.difference(question, answer, wrong) > SHARP, wrong


@one_server
def test_switched_off(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(30), setting=None)
    [answer] = exchange.check(question)
    assert exchange.difference(question, answer, Setting(16, 16)) > SHARP


@one_server
def test_short_video_is_dense(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(6), setting=Setting(4, 8))  # sink and one block hold its 6 steps
    [answer] = exchange.check(question)
    assert not exchange.sparse_positions(question)
    exchange.compare([about(clip(6), setting=None)], [answer])


@one_server
@pytest.mark.parametrize("setting", [Setting(4, 4), Setting(0, 6)])
def test_two_videos_and_text_around(exchange: Exchange, clip: Clip, setting: Setting) -> None:
    text = f"One: {VIDEO}then, after a while, {VIDEO}which is longer?"
    videos = (clip(10), clip(14, seed=1))
    exchange.check(Question(SYSTEM + user(text), videos, setting=setting))


@one_server
@pytest.mark.parametrize("order", [(VIDEO, IMAGE), (IMAGE, VIDEO), (IMAGE, VIDEO, IMAGE)])
def test_image_beside_a_video(
    exchange: Exchange, clip: Clip, picture: Picture, order: tuple[str, ...]
) -> None:
    images = tuple(picture(i) for i in range(order.count(IMAGE)))
    text = SYSTEM + user(" and ".join(order) + "?")
    exchange.check(Question(text, (clip(14),), images, Setting(4, 4)))


@one_server
def test_second_turn(exchange: Exchange, clip: Clip) -> None:
    """The first turn is in the cache, its answer included, when the second follows."""
    exchange.flush()
    first = about(clip(12), setting=Setting(4, 4), new_tokens=6)
    [answer] = exchange.check(first)
    turn = first.text + answer.text + "<|im_end|>\n"
    again = Question(turn + user("And then?"), first.videos, setting=Setting(4, 4))
    [second] = exchange.check(replace(again, start=answer.prompt_tokens))
    assert second.cached_tokens == answer.prompt_tokens
    # SGLang hashes all videos of a prompt as one, so another video changes the prefix.
    videos = (*first.videos, clip(10, seed=1))
    exchange.check(Question(turn + user(VIDEO + "And in this?"), videos, setting=Setting(4, 4)))


@one_server
@pytest.mark.parametrize("setting", [Setting(2, 2, True), Setting(0, 3, True), Setting(3, 1, True)])
def test_image_run(exchange: Exchange, picture: Picture, setting: Setting) -> None:
    """Text in the gaps belongs to no image, and is GLOBAL."""
    pictures = tuple(picture(i) for i in range(9))
    text = "Look: " + "".join(f"{IMAGE} is number {i}. " for i in range(9)) + "Which is best?"
    question = Question(SYSTEM + user(text), images=pictures, setting=setting)
    [answer] = exchange.check(question)
    assert exchange.sparse_positions(question)
    assert exchange.difference(question, answer, None) > SHARP


@one_server
@pytest.mark.parametrize("gap", [32, 33])
def test_longest_gap_of_an_image_run(exchange: Exchange, picture: Picture, gap: int) -> None:
    """At 33 tokens there are two runs, each with a sink of its own."""
    letters = "z" * (gap - 2)  # a token each; vision_end and vision_start are the other two
    images = tuple(picture(i) for i in range(6))
    text = SYSTEM + user(3 * IMAGE + letters + 3 * IMAGE)
    question = Question(text, images=images, setting=Setting(1, 1, True))
    exchange.check(question)
    sparse_images = len(exchange.sparse_positions(question)) // 12
    assert sparse_images == (4 if gap == 32 else 3)


@one_server
def test_image_run_grows(exchange: Exchange, picture: Picture) -> None:
    """The second turn goes on with the run of the first, whose keys are in the cache."""
    images = tuple(picture(i) for i in range(7))
    setting = Setting(2, 2, True)
    exchange.flush()
    first = Question(SYSTEM + user(4 * IMAGE), images=images[:4], setting=setting)
    [answer] = exchange.check(first)
    turn = first.text + "Good.<|im_end|>\n" + user(3 * IMAGE + "And now?")
    [second] = exchange.check(Question(turn, (), images, setting, start=answer.prompt_tokens))
    assert second.cached_tokens == answer.prompt_tokens


@one_server
def test_video_inside_an_image_run_ends_it(
    exchange: Exchange, clip: Clip, picture: Picture
) -> None:
    images = tuple(picture(i) for i in range(6))
    text = SYSTEM + user(3 * IMAGE + VIDEO + 3 * IMAGE)  # a video of 24 tokens, less than a gap
    exchange.check(Question(text, (clip(2),), images, Setting(1, 1, True)))


@one_server
def test_image_run_beside_a_video(exchange: Exchange, clip: Clip, picture: Picture) -> None:
    """Two sampled frames a step in the video, one in the run."""
    images = tuple(picture(i) for i in range(5))
    text = VIDEO + "z" * 40 + 5 * IMAGE
    exchange.check(Question(SYSTEM + user(text), (clip(10),), images, setting=Setting(3, 2, True)))


@one_server
def test_images_alone_are_dense(exchange: Exchange, picture: Picture) -> None:
    images = tuple(picture(i) for i in range(6))
    question = Question(SYSTEM + user(6 * IMAGE), images=images, setting=Setting(1, 1))
    [answer] = exchange.check(question)
    assert exchange.difference(question, answer, Setting(1, 1, True)) > SHARP
