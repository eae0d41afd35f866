"""LLaVA-Video on a real server: videos, lists of frames and pictures against the reference.

A frame is 12 tokens and a chunk 64, so chunks cut frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.exchange import (
    SHARP,
    SYSTEM,
    TOKEN_IDS,
    TOLERANCE,
    Answer,
    Exchange,
    Question,
    read_answer,
    user,
)
from support.families.llava_video import NUM_FRAMES
from support.oracle import Setting
from support.video import video_data_url

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = [
    pytest.mark.server,
    pytest.mark.parametrize("exchange", ["llava_video"], indirect=True),
]
VIDEO, IMAGE = "<video>", "<image>"
TOKENS = 12  # of a frame: three rows of three features and a newline


def about(video: Path, text: str = "What happens in the video?", **fields: Any) -> Question:
    return Question(SYSTEM + user(VIDEO + text), (video,), **fields)


def generate(
    exchange: Exchange, text: str, setting: Setting | None, **media: Any
) -> tuple[Answer, dict[str, Any]]:
    """One request on ``/generate``, in the forms that :class:`Exchange` does not send."""
    override = {"enabled": False} if setting is None else vars(setting)
    sampling = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
    body = {
        "text": text,
        "sampling_params": {**sampling, "custom_params": {"pevlm": override}},
        "return_logprob": True,
        "logprob_start_len": 0,
        "token_ids_logprob": list(TOKEN_IDS),
        **media,
    }
    before = exchange.totals()["sparse_tokens"]
    answer = read_answer(exchange.server.generate(**body))
    return answer, {"sparse": exchange.totals()["sparse_tokens"] - before}


def compare(exchange: Exchange, answer: Answer, inputs: Any, setting: Setting | None) -> None:
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    expected = exchange.oracle.logprobs(inputs, setting, answer.tokens)[:-1, list(TOKEN_IDS)]
    assert float((answer.logprobs - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("sink_frames", [0, 2, 16])
@pytest.mark.parametrize("block_frames", [1, 5, 16])
def test_sizes(exchange: Exchange, clip: Clip, sink_frames: int, block_frames: int) -> None:
    exchange.check(about(clip(10), setting=Setting(sink_frames, block_frames)))


def test_full_attention(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(10), setting=None)
    [answer] = exchange.check(question)
    assert exchange.difference(question, answer, Setting(4, 4)) > SHARP


def test_another_mask_would_show(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(10), setting=Setting(4, 4))
    [answer] = exchange.check(question)
    for wrong in (None, Setting(3, 4), Setting(5, 4), Setting(4, 3), Setting(4, 5)):
        assert exchange.difference(question, answer, wrong) > SHARP, wrong


@pytest.mark.parametrize("frames", [1, 8, 16, 17, 64])
def test_number_of_frames(exchange: Exchange, clip: Clip, frames: int) -> None:
    """Of a video of 40 frames: 64 repeat some, as in the reference."""
    prompt = SYSTEM + user(VIDEO + "What happens?")
    wish = {"url": str(clip(10)), "max_frames": frames}
    answer, _ = generate(exchange, prompt, Setting(4, 4), video_data=[wish])
    inputs = exchange.oracle.inputs(prompt, [clip(10)], max_frames=frames)  # type: ignore[call-arg]
    [video] = exchange.oracle.videos(inputs)
    assert len(video) == frames
    assert video[-1][1] - video[0][0] == frames * TOKENS
    compare(exchange, answer, inputs, Setting(4, 4))


@pytest.mark.parametrize(("fps", "most", "frames"), [(1, NUM_FRAMES, 10), (2, 8, 8), (3, 80, 40)])
def test_frames_a_second(
    exchange: Exchange, clip: Clip, fps: float, most: int, frames: int
) -> None:
    """Every so many frames of the file, or evenly where these are too many."""
    prompt = SYSTEM + user(VIDEO + "What happens?")
    wish = {"url": str(clip(10)), "fps": fps, "max_frames": most}
    answer, _ = generate(exchange, prompt, Setting(2, 2), video_data=[wish])
    arguments: dict[str, Any] = {"max_frames": most, "fps": fps}
    inputs = exchange.oracle.inputs(prompt, [clip(10)], **arguments)
    assert len(exchange.oracle.videos(inputs)[0]) == frames
    compare(exchange, answer, inputs, Setting(2, 2))


@pytest.mark.parametrize("setting", [Setting(4, 4), Setting(0, 6)])
def test_two_videos(exchange: Exchange, clip: Clip, setting: Setting) -> None:
    text = f"One: {VIDEO}then, after a while, {VIDEO}which is longer?"
    videos = (clip(10), clip(14, seed=1))
    exchange.check(Question(SYSTEM + user(text), videos, setting=setting))


def test_text_alone_in_the_same_batch(exchange: Exchange, clip: Clip) -> None:
    exchange.check(
        about(clip(10), setting=Setting(4, 4), new_tokens=6),
        Question(SYSTEM + user("Who are you?"), new_tokens=9),
        about(clip(14, seed=1), "And here?", setting=Setting(0, 5)),
        about(clip(10), "Without?", setting=None),
    )


def test_placeholder_of_the_reference(exchange: Exchange, clip: Clip) -> None:
    """It writes ``<image>`` for a video."""
    question = about(clip(10), setting=Setting(4, 4))
    [answer] = exchange.check(question)
    text = question.text.replace(VIDEO, IMAGE)
    again, _ = generate(exchange, text, Setting(4, 4), video_data=[str(clip(10))])
    assert again.prompt_tokens == answer.prompt_tokens
    assert float((again.logprobs - answer.logprobs).abs().max()) <= TOLERANCE


def test_hit_ends_in_a_block(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(10), setting=Setting(4, 4))
    exchange.flush()
    exchange.check(question)
    blocks = exchange.sparse_positions(question)[0]
    for start in (blocks, blocks + 5, blocks + TOKENS, blocks + 3 * TOKENS + 11):
        [answer] = exchange.check(replace(question, start=start))
        assert answer.cached_tokens == start


def test_second_turn(exchange: Exchange, clip: Clip) -> None:
    """Another video does not change the prefix: a video is an item of its own."""
    exchange.flush()
    first = about(clip(10), setting=Setting(4, 4), new_tokens=6)
    [answer] = exchange.check(first)
    turn = first.text + answer.text + "<|im_end|>\n" + user(VIDEO + "And in this?")
    videos = (*first.videos, clip(14, seed=1))
    [second] = exchange.check(
        Question(turn, videos, setting=Setting(4, 4), start=answer.prompt_tokens - 2)
    )
    assert second.cached_tokens == answer.prompt_tokens - 2


# --- Pictures ------------------------------------------------------------------------------------


def test_picture_alone(exchange: Exchange, picture: Picture) -> None:
    """Anyres: the whole picture, then its tiles, of which 112 × 84 pixels need 2 × 2."""
    question = Question(SYSTEM + user(IMAGE + "What is it?"), images=(picture(0),))
    [answer] = exchange.check(question)
    assert answer.prompt_tokens > 25 + 25


def test_wide_picture_alone(exchange: Exchange, tmp_path: Path, picture: Picture) -> None:
    """More tiles than nine: their features are scaled down."""
    path = tmp_path / "wide.png"
    with Image.open(picture(0)) as image:
        image.resize((420, 371)).save(path)
    exchange.check(Question(SYSTEM + user(IMAGE + "What is it?"), images=(path,)))


@pytest.mark.parametrize("order", [(VIDEO, IMAGE), (IMAGE, VIDEO), (IMAGE, VIDEO, IMAGE)])
def test_picture_beside_a_video(
    exchange: Exchange, clip: Clip, picture: Picture, order: tuple[str, ...]
) -> None:
    images = tuple(picture(i) for i in range(order.count(IMAGE)))
    text = SYSTEM + user(" and ".join(order) + "?")
    exchange.check(Question(text, (clip(10),), images, Setting(4, 4)))


@pytest.mark.parametrize("setting", [Setting(1, 1, True), Setting(0, 2, True), Setting(1, 1)])
def test_run_of_pictures(exchange: Exchange, picture: Picture, setting: Setting) -> None:
    images = tuple(picture(i) for i in range(6))
    text = SYSTEM + user((IMAGE + "\n") * 6 + "Which is best?")
    question = Question(text, (), images, setting)
    [answer] = exchange.check(question)
    assert bool(exchange.sparse_positions(question)) == setting.image_runs
    if setting.image_runs:
        assert exchange.difference(question, answer, None) > SHARP


# --- Lists of frames -----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5, 20])
@pytest.mark.parametrize("setting", [Setting(2, 3), Setting(0, 1), None])
def test_list_of_frames(
    exchange: Exchange, picture: Picture, frames: int, setting: Setting | None
) -> None:
    paths = [picture(i) for i in range(frames)]
    prompt = SYSTEM + user((IMAGE + "\n") * frames + "What happens?")
    exchange.flush()
    answer, computed = generate(
        exchange,
        prompt,
        setting,
        image_data=[str(path) for path in paths],
        modalities=["video"] * frames,
    )
    images = [Image.open(path).convert("RGB") for path in paths]
    inputs = exchange.oracle.inputs(prompt, (), images, listed=True)  # type: ignore[call-arg]
    compare(exchange, answer, inputs, setting)
    mask = exchange.oracle.mask(inputs, setting, answer.prompt_tokens)
    assert computed["sparse"] == sum(row.sum() < i + 1 for i, row in enumerate(mask))


def test_list_of_frames_in_a_chat(exchange: Exchange, picture: Picture) -> None:
    paths = [picture(i) for i in range(5)]
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": str(path)}, "modalities": "video"}
        for path in paths
    ]
    override = {"custom_params": {"pevlm": {"sink_frames": 2, "block_frames": 1}}}
    text = "What happens?"
    answer = exchange.server.chat([*parts, {"type": "text", "text": text}], **override)
    prompt = SYSTEM + user((IMAGE + "\n") * 5 + text)
    images = [Image.open(path).convert("RGB") for path in paths]
    inputs = exchange.oracle.inputs(prompt, (), images, listed=True)  # type: ignore[call-arg]
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]


# --- Chat ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "file", "data"])
@pytest.mark.parametrize("wishes", [{}, {"max_frames": 9}, {"fps": 1}])
def test_chat(exchange: Exchange, clip: Clip, kind: str, wishes: dict[str, Any]) -> None:
    """The ordinary request, with no chat template in the launch command: the checkpoint's own is
    of text alone."""
    urls = {"path": str(clip(10)), "file": clip(10).as_uri(), "data": video_data_url(clip(10))}
    text = "What happens in the video?"
    parts = [
        {"type": "video_url", "video_url": {"url": urls[kind], **wishes}},
        {"type": "text", "text": text},
    ]
    override = {"custom_params": {"pevlm": {"sink_frames": 2, "block_frames": 4}}}
    said = exchange.server.chat(parts, logprobs=True, max_tokens=4, **override)
    prompt = SYSTEM + user(VIDEO + text)
    inputs = exchange.oracle.inputs(prompt, [clip(10)], **wishes)
    assert said["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    first = said["choices"][0]["logprobs"]["content"][0]["logprob"]
    expected = exchange.oracle.logprobs(inputs, Setting(2, 4))[-1].max()
    assert first == pytest.approx(float(expected), abs=TOLERANCE)


def test_what_is_corrected_is_said(exchange: Exchange) -> None:
    said = exchange.server.info()["pevlm"]["vision_corrections"]
    assert any("LLaVA-NeXT" in line for line in said)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_frames": 81}, "max_frames: expected at most 80, the server's limit, got 81"),
        ({"max_frames": 0}, "max_frames: expected a whole number"),
        ({"max_frames": 2.5}, "2.5"),
        ({"fps": -1}, "fps: expected a number"),
        ({"max_pixels": 100}, "max_pixels: expected one of fps, max_frames"),
        ({"nframes": 3}, "nframes"),
    ],
)
def test_bad_wish(exchange: Exchange, clip: Clip, wishes: dict[str, Any], message: str) -> None:
    body = {
        "text": SYSTEM + user(VIDEO + "What?"),
        "video_data": [{"url": str(clip(10)), **wishes}],
        "sampling_params": {"max_new_tokens": 1},
    }
    response = exchange.server.post("/generate", body)
    assert response.status_code == 400
    assert message in response.text
    exchange.check(about(clip(10)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("What?", "expected 1 of <video>, one for each video, got 0"),
        (VIDEO + VIDEO, "expected 1 of <video>, one for each video, got 2"),
        (VIDEO + IMAGE, "expected 0 of <image>, one for each image, got 1"),
    ],
)
def test_placeholders_that_do_not_fit(
    exchange: Exchange, clip: Clip, text: str, message: str
) -> None:
    body = {"text": text, "video_data": [str(clip(10))], "sampling_params": {"max_new_tokens": 1}}
    response = exchange.server.post("/generate", body)
    assert response.status_code == 400
    assert message in response.text
    exchange.check(about(clip(10)))


@pytest.mark.parametrize("kind", ["corrupt", "empty", "missing"])
def test_broken_video(exchange: Exchange, clip: Clip, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken.mp4"
    if kind != "missing":
        whole = clip(10).read_bytes()
        path.write_bytes(whole[:3000] + bytes(3000) if kind == "corrupt" else b"")
    body = {
        "text": VIDEO + "What?",
        "video_data": [str(path)],
        "sampling_params": {"max_new_tokens": 1},
    }
    assert exchange.server.post("/generate", body).status_code == 400
    exchange.check(about(clip(10)))
