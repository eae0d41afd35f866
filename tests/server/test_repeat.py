"""One video, many questions: what was prepared stays so, for its tenant, until it is flushed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from support.exchange import SYSTEM, VIDEO, Exchange, Question, Sampled, about, user
from support.families import internvl, longvila
from support.oracle import Setting

Clip = Callable[..., Path]

pytestmark = pytest.mark.server
one_server = pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True)
SMALL = Setting(4, 4)


class Decoded:
    """Frames that the server decoded inside a ``with`` block, by its log."""

    frames = 0
    requests = 0


@contextmanager
def decoding(exchange: Exchange) -> Iterator[Decoded]:
    seen, before = Decoded(), len(exchange.server.log())
    yield seen
    found = re.findall(r"PEVLM media, #frame: (\d+)", exchange.server.log()[before:])
    seen.frames, seen.requests = sum(map(int, found)), len(found)


@pytest.mark.parametrize(
    ("exchange", "placeholder"),
    [
        ("chunk_257", VIDEO),
        ("qwen3_vl", VIDEO),
        ("internvl", internvl.VIDEO),
        ("llava_video", "<video>"),
        ("longvila", longvila.VIDEO),
    ],
    indirect=["exchange"],
)
def test_a_second_question(exchange: Exchange, clip: Clip, placeholder: str) -> None:
    """Nothing is decoded for it, whether its keys are cached or not; every answer is right."""
    video = clip(10, seed=40)

    def ask(text: str) -> Question:
        return Question(SYSTEM + user(placeholder + text), (video,), setting=SMALL)

    exchange.flush()
    with decoding(exchange) as first:
        exchange.check(ask("Why?"))
    with decoding(exchange) as second:
        exchange.check(ask("Um"))
    assert first.frames > 0
    assert (second.requests, second.frames) == (1, 0)
    exchange.flush()
    with decoding(exchange) as third:
        exchange.check(ask("Um"))
    assert third.frames == first.frames


@one_server
def test_other_wishes_are_prepared_anew(exchange: Exchange, clip: Clip) -> None:
    video = clip(10, seed=41)
    exchange.flush()
    for wishes, new in (({}, True), ({"fps": 1}, True), ({"max_pixels": 5000}, True), ({}, False)):
        with decoding(exchange) as seen:
            exchange.check(about(Sampled(video, wishes), setting=SMALL))
        assert (seen.frames > 0) == new, wishes


@one_server
def test_a_file_that_is_replaced(exchange: Exchange, clip: Clip, tmp_path: Path) -> None:
    """Under the same name, with the same size and time of writing it even: another video."""
    path = tmp_path / "camera.mp4"
    exchange.flush()
    answers = []
    for seed in (42, 43, 42):
        other = tmp_path / "other.mp4"
        other.write_bytes(clip(10, seed=seed).read_bytes())
        other.replace(path)
        [answer] = exchange.check(about(path, setting=SMALL))
        answers.append(answer)
    assert not torch.allclose(answers[0].logprobs, answers[1].logprobs, atol=1e-2)


@one_server
def test_who_asks_at_the_same_time(exchange: Exchange, clip: Clip) -> None:
    video = clip(30, seed=44)
    exchange.flush()
    with decoding(exchange) as alone:
        exchange.check(about(video))
    exchange.flush()
    questions = [about(video, text) for text in ("Why?", "Um", "Who?", "When?")]
    with decoding(exchange) as together:
        exchange.check(*questions)
    assert together.frames == alone.frames


@one_server
def test_nothing_is_found_across_tenants(exchange: Exchange, clip: Clip) -> None:
    video = str(clip(10, seed=45))
    exchange.flush()

    def ask(**tenant: str) -> int:
        body: dict[str, Any] = {
            "text": SYSTEM + user(VIDEO + "Why?"),
            "video_data": [video],
            "sampling_params": {"max_new_tokens": 1},
            **tenant,
        }
        with decoding(exchange) as seen:
            assert exchange.server.post("/generate", body).status_code == 200
        return seen.frames

    first = ask(extra_key="a")
    assert first > 0
    assert ask(extra_key="a") == 0
    assert ask(extra_key="b") == ask() == first


@one_server
def test_a_conversation_that_grows(exchange: Exchange, clip: Clip) -> None:
    """Each turn brings a video: the turns before it are neither decoded nor computed again. SGLang
    alone makes one item of all videos of a prompt, and loses the whole prefix."""
    text, videos = SYSTEM, ()
    exchange.flush()
    ends = 0
    for turn in range(3):
        text += f"<|im_start|>user\n{VIDEO}And?<|im_end|>\n<|im_start|>assistant\n"
        videos += (clip(10 + 2 * turn, seed=46 + turn),)
        before = exchange.totals()
        with decoding(exchange) as seen:
            [answer] = exchange.check(Question(text, videos, setting=SMALL, start=ends))
        assert answer.cached_tokens == ends
        assert 0 < seen.frames <= 2 * (10 + 2 * turn)
        assert exchange.totals()["vision_items"] - before["vision_items"] <= 2  # clips of 16 frames
        ends = answer.prompt_tokens - 1
        text += "Yes.<|im_end|>\n"


@one_server
def test_a_longer_version(exchange: Exchange, clip: Clip, tmp_path: Path) -> None:
    """The prefix is found up to the first clip that differs, though the file is another."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.encoders import VideoEncoder

    paths = []
    frames = VideoDecoder(str(clip(30, seed=50)))[:]
    for count in (36, 52):
        path = tmp_path / f"{count}.mp4"
        VideoEncoder(frames[:count], frame_rate=2).to_file(
            path, codec="libx264", pixel_format="yuv420p", crf=0, preset="ultrafast"
        )
        paths.append(path)
    exchange.flush()
    exchange.check(about(paths[0]))
    longer = about(paths[1])
    steps = exchange.oracle.videos(exchange.inputs(longer))[0]
    [answer] = exchange.check(Question(longer.text, longer.videos, start=steps[-1][1]))
    assert answer.cached_tokens == steps[16][0]  # two clips of 8 steps each
