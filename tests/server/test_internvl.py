"""InternVL3.5 on the real server: log-probabilities against the reference under the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.exchange import SHARP, SYSTEM, TOKEN_IDS, TOLERANCE, Exchange, Question, user
from support.families.internvl import IMAGE, VIDEO, InternVLOracle
from support.oracle import Setting

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = pytest.mark.server
dense = pytest.mark.parametrize("exchange", ["internvl"], indirect=True)
both = pytest.mark.parametrize("exchange", ["internvl", "internvl_moe"], indirect=True)


def about(video: Path, text: str = "What happens?", **fields: Any) -> Question:
    return Question(SYSTEM + user(VIDEO + text), (video,), **fields)


@both
@pytest.mark.parametrize("setting", [Setting(2, 2), Setting(0, 3), Setting(3, 5), None])
def test_sizes(exchange: Exchange, clip: Clip, setting: Setting | None) -> None:
    exchange.check(about(clip(8), setting=setting))


@both
def test_another_mask_would_show(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(8), setting=Setting(3, 3))
    [answer] = exchange.check(question)
    for wrong in (None, Setting(2, 3), Setting(4, 3), Setting(3, 2), Setting(3, 4)):
        assert exchange.difference(question, answer, wrong) > SHARP, wrong


@dense
@pytest.mark.parametrize("text", ["", "\nWhat?", "\n\nWhat?", " What?"])
def test_text_that_may_merge_with_the_closing_newline(
    exchange: Exchange, clip: Clip, text: str
) -> None:
    exchange.check(about(clip(8), text, setting=Setting(2, 3)))


@dense
def test_text_that_merges_with_the_label(exchange: Exchange, clip: Clip) -> None:
    """The token "KeyFrame" is the user's."""
    question = Question(SYSTEM + user(f"Key{VIDEO}?"), (clip(8),), setting=Setting(1, 3))
    ids = exchange.inputs(question)["input_ids"][0].tolist()
    assert exchange.oracle.tokenizer.convert_tokens_to_ids("KeyFrame") in ids
    exchange.check(question)


@dense
@pytest.mark.parametrize("setting", [Setting(2, 4), Setting(0, 5)])
@pytest.mark.parametrize("between", ["then, after a while, ", ""])
def test_two_videos(exchange: Exchange, clip: Clip, setting: Setting, between: str) -> None:
    text = f"One: {VIDEO}{between}{VIDEO}which is longer?"
    exchange.check(Question(SYSTEM + user(text), (clip(4), clip(6, seed=1)), setting=setting))


@both
@pytest.mark.parametrize("order", [(VIDEO, IMAGE), (IMAGE, VIDEO), (IMAGE, VIDEO, IMAGE)])
def test_image_beside_a_video(
    exchange: Exchange, clip: Clip, picture: Picture, order: tuple[str, ...]
) -> None:
    images = tuple(picture(i) for i in range(order.count(IMAGE)))
    text = SYSTEM + user(" and ".join(order) + "?")
    exchange.check(Question(text, (clip(8),), images, Setting(3, 3)))


@dense
def test_image_run(exchange: Exchange, picture: Picture) -> None:
    images = tuple(picture(i) for i in range(4))
    question = Question(
        SYSTEM + user(IMAGE * 4 + "Which?"), images=images, setting=Setting(1, 1, True)
    )
    exchange.check(question)
    assert exchange.sparse_positions(question)


@both
def test_prefix_hits_in_the_middle_of_a_block(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(8), setting=Setting(2, 4))
    exchange.flush()
    [first] = exchange.check(question)
    sparse = exchange.sparse_positions(question)
    for start in (sparse[0] + 7, sparse[len(sparse) // 2] + 3, first.prompt_tokens - 2):
        [again] = exchange.check(replace(question, start=start))
        assert again.cached_tokens == start


@dense
def test_second_turn_with_another_video(exchange: Exchange, clip: Clip) -> None:
    """Each video is an item of its own, so the first is still in the cache."""
    exchange.flush()
    first = about(clip(8), setting=Setting(2, 3), new_tokens=6)
    [answer] = exchange.check(first)
    turn = first.text + answer.text + "<|im_end|>\n" + user(VIDEO + "And in this?")
    videos = (*first.videos, clip(6, seed=1))
    [second] = exchange.check(
        Question(turn, videos, setting=Setting(2, 3), start=answer.prompt_tokens)
    )
    assert second.cached_tokens == answer.prompt_tokens


@dense
def test_short_video_is_dense(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(8), setting=Setting(4, 8))  # sink and one block hold its 12 frames
    [answer] = exchange.check(question)
    assert not exchange.sparse_positions(question)
    exchange.compare([replace(question, setting=None)], [answer])


# --- The number of frames, a request at a time ---------------------------------------------------


def ask(exchange: Exchange, question: Question, videos: list[Any], **more: Any) -> Any:
    return exchange.server.post(
        "/generate",
        {
            "text": question.text,
            "video_data": videos,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": 1,
                "custom_params": {"pevlm": question.override},
            },
            "return_logprob": True,
            "logprob_start_len": 0,
            "token_ids_logprob": list(TOKEN_IDS),
            **more,
        },
    )


@dense
@pytest.mark.parametrize("counts", [(5, 12), (20, 3)])
def test_frames_of_each_video(exchange: Exchange, clip: Clip, counts: tuple[int, int]) -> None:
    clips = (clip(8), clip(6, seed=1))
    question = Question(SYSTEM + user(VIDEO + "or" + VIDEO + "?"), clips, setting=Setting(2, 3))
    videos: list[Any] = [
        {"url": str(path), "max_frames": count} if count != 12 else str(path)
        for path, count in zip(clips, counts, strict=True)
    ]
    answer = ask(exchange, question, videos).json()["meta_info"]
    oracle = exchange.oracle
    assert isinstance(oracle, InternVLOracle)
    inputs = oracle.inputs(question.text, clips, num_frames=counts)
    assert answer["prompt_tokens"] == inputs["input_ids"].shape[1]
    expected = oracle.logprobs(inputs, question.setting)[:-1, list(TOKEN_IDS)]
    for row, logprobs in zip(expected, answer["input_token_ids_logprobs"][1:], strict=True):
        assert max(abs(float(x) - got[0]) for x, got in zip(row, logprobs, strict=True)) < TOLERANCE


@dense
@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"max_frames": 41}, "max_frames: expected at most 40, the server's limit, got 41"),
        ({"max_frames": 0}, "max_frames: expected a whole number"),
        ({"fps": 2}, "fps: expected one of max_frames for this model"),
        ({"max_pixels": 100000}, "max_pixels: expected one of max_frames for this model"),
        ({"num_frames": 3}, "video num_frames: expected one of fps, max_frames, max_pixels"),
    ],
)
def test_bad_wishes(exchange: Exchange, clip: Clip, wish: dict[str, Any], message: str) -> None:
    response = ask(exchange, about(clip(8)), [{"url": str(clip(8)), **wish}])
    assert response.status_code == 400
    assert message in response.text


SYSTEM_OF_CHAT = (  # of the model card
    "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及"  # noqa: RUF001
    "多家合作单位联合开发的多模态大语言模型。<|im_end|>\n"
)


@dense
def test_chat(exchange: Exchange, clip: Clip, picture: Picture) -> None:
    """Each media is written out once; ``max_frames`` stands beside ``url``."""
    content = [
        {"type": "image_url", "image_url": {"url": str(picture(0))}},
        {"type": "video_url", "video_url": {"url": str(clip(8)), "max_frames": 5}},
        {"type": "text", "text": "What?"},
    ]
    body = exchange.server.chat(content, max_tokens=1)
    oracle = exchange.oracle
    assert isinstance(oracle, InternVLOracle)
    text = SYSTEM_OF_CHAT + user(f"{IMAGE}\n{VIDEO}What?")
    inputs = oracle.inputs(text, [clip(8)], [Image.open(picture(0))], num_frames=[5])
    assert body["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]


@dense
def test_corrections_are_reported(exchange: Exchange) -> None:
    corrections = exchange.server.info()["pevlm"]["vision_corrections"]
    assert "frames are the middles of equal segments of the video" in corrections
    assert f"PEVLM vision corrections: {'; '.join(corrections)}" in exchange.server.log()
