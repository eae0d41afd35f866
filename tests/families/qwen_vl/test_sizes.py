"""The token counts of ``pevlm show`` are the server's, frame sampling and resizing included."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from families.qwen_vl.test_processor import FEW, MODELS, Model, Start, clip, models, start
from pevlm_sglang.families.qwen_vl.sizes import PUBLISHED, QwenGeometry, VideoSettings
from pevlm_sglang.settings.config import PevlmConfig
from pevlm_sglang.tools.cli import main
from pevlm_sglang.tools.show import Model as ShownModel
from pevlm_sglang.tools.show import Prompt, Request

__all__ = ["clip", "models", "start"]  # fixtures

SIZES = [
    (1280, 720),
    (720, 1280),
    (1920, 1080),
    (640, 360),
    (113, 203),
    (500, 500),
    (27, 29),
    (3840, 1607),
    (2000, 11),
    (4000, 84),
    (1, 199),
    (448, 224),
]
SETTINGS = [
    {},
    {"fps": 1, "max_frames": 100},
    {"fps": 0.3, "min_frames": 7},
    {"fps": 29.97, "max_frames": 33},
    {"nframes": 7},
    {"nframes": 64},
    {"min_pixels": 3136},
    {"min_pixels": 700_000},
    {"max_pixels": 50_000},
    {"max_pixels": 602_113, "total_pixels": 5_000_000},
    {"min_pixels": 784, "max_pixels": 12_000, "total_pixels": 1_000_000},
    {"total_pixels": 1e7},
]


def show(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert main(["show", *shlex.split(command)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture(scope="module")
def upstream() -> Any:
    from sglang.srt.multimodal.processors import qwen_vl as module

    return module


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """qwen-vl-utils, with blank frames and no work in a resize."""
    from qwen_vl_utils import vision_process as module

    def read(video: Mapping[str, Any]) -> Any:
        frames, width, height = (int(part) for part in re.split("[:x]", video["video"]))
        return torch.zeros(1, dtype=torch.uint8).expand(frames, 3, height, width), {}, 2.0

    monkeypatch.setattr(module, "get_video_reader_backend", lambda: "blank")
    monkeypatch.setitem(module.VIDEO_READER_BACKENDS, "blank", read)
    monkeypatch.setattr(module.transforms.functional, "resize", blank_resize)
    return module


def blank_resize(video: torch.Tensor, size: list[int], *_: Any, **__: Any) -> torch.Tensor:
    if 0 in size:
        raise ValueError("torchvision refuses an empty picture")
    return video[:1, :1, :1, :1].expand(1, 1, *size)


def outcome(function: Any, *arguments: Any) -> Any:
    """What a function returns, or the name of a refusal."""
    try:
        return function(*arguments)
    except (ValueError, AssertionError):
        return "refused"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_frames_are_the_references(
    upstream: Any, reference: Any, settings: dict[str, Any]
) -> None:
    rng = random.Random(0)
    cases = [(total, fps) for total in range(1, 12) for fps in (1.0, 2.0, 30.0)]
    cases += [(rng.randint(1, 9000), rng.choice([24.0, 25.0, 29.97, 30.0])) for _ in range(300)]
    geometry = PUBLISHED["qwen2_5_vl"]
    refusals = 0
    for total, fps in cases:
        ours = outcome(geometry.sampled_frames, total, fps, VideoSettings(**settings))
        assert ours == outcome(reference.smart_nframes, settings, total, fps), (total, fps)
        assert ours == outcome(upstream.smart_nframes, settings, total, fps), (total, fps)
        refusals += ours == "refused"
    assert 0 < refusals < len(cases)


def our_size(geometry: QwenGeometry, frames: int, size: tuple[int, int], settings: Any) -> Any:
    return geometry.resized(frames, size, geometry.settings(settings))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    "settings",
    [*SETTINGS, {"resized_height": 300, "resized_width": 77}, {"max_pixels": 900}],
    ids=str,
)
def test_size_is_the_references(reference: Any, name: str, settings: dict[str, Any]) -> None:
    geometry = PUBLISHED[name]
    if settings.get("max_pixels", 0) > 768 * geometry.factor**2:
        pytest.skip("beyond the reference's own bound, see below")

    def theirs(frames: int, size: tuple[int, int]) -> Any:
        video = {"video": f"{frames}:{size[0]}x{size[1]}", **settings}
        shape = reference.fetch_video(video, image_patch_size=geometry.patch_size).shape
        return shape[-1], shape[-2]

    sizes = [*SIZES, (1, 201), (20_001, 101)]
    for size, frames in itertools.product(sizes, [2, 4, 64, 300, 768]):
        ours = outcome(our_size, geometry, frames, size, settings)
        assert ours == outcome(theirs, frames, size), (size, frames)


@pytest.mark.parametrize(
    "settings", [settings for settings in SETTINGS if "max_pixels" in settings], ids=str
)
def test_size_is_sglangs_beyond_the_reference(
    upstream: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """``max_pixels`` above 768 tokens takes effect, as it does in SGLang."""
    geometry = PUBLISHED["qwen2_5_vl"]
    settings = {"min_pixels": 3136, **settings}

    class Decoder(upstream.VideoDecoderWrapper):
        avg_fps = 2.0

        def __init__(self, frames: int, size: tuple[int, int]) -> None:
            self.shape = frames, size[1], size[0], 3

        def __len__(self) -> int:
            return self.shape[0]

        def __del__(self) -> None:
            pass

        def get_frames_as_tensor(self, indices: list[int]) -> Any:
            return torch.zeros(1, dtype=torch.uint8).expand(self.shape)

    monkeypatch.setattr(upstream, "is_cpu", lambda: True)  # pinned memory needs a GPU
    monkeypatch.setattr(upstream.torchvision.transforms.functional, "resize", blank_resize)

    def theirs(frames: int, size: tuple[int, int]) -> Any:
        video = asyncio.run(
            upstream.preprocess_video(Decoder(frames, size), video_config=settings | {"fps": 2})
        )[0]
        return video.shape[-1], video.shape[-2]

    for size, frames in itertools.product(SIZES, [4, 64, 768]):
        ours = outcome(our_size, geometry, frames, size, settings)
        assert ours == outcome(theirs, frames, size), (size, frames)


# --- The whole prompt ------------------------------------------------------------------------

SPECIAL = re.compile(r"(<\|\w+\|>)")
WORD = re.compile(r"\s*\n| ?[a-zA-Z]+|\d| ?[^\s\w]+")
"""What Qwen's tokenizer splits text into, as far as the texts here go; each of these is one token
of its vocabulary."""


def qwen_tokens(text: str) -> list[str]:
    """Text as Qwen's tokenizer has it; the tiny model's may need more tokens for a word."""
    parts = [part for part in SPECIAL.split(text) if part]
    return [
        token
        for part in parts
        for token in ([part] if SPECIAL.fullmatch(part) else WORD.findall(part))
    ]


def test_timestamp_of_a_step() -> None:
    assert qwen_tokens("<12.5 seconds><|vision_start|>") == [
        *("<", "1", "2", ".", "5", " seconds", ">", "<|vision_start|>")
    ]


SYSTEM = "You are a helpful assistant."
PROMPTS = {False: "", True: f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"}
PADS = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        ((320, 180), 30, 30.0, {}),
        ((180, 320), 75, 30.0, {"fps": 4}),
        ((102, 78), 100, 25.0, {"max_pixels": 20_000, "min_pixels": 3136}),
        ((640, 480), 20, 10.0, {"max_pixels": 2_000_000}),
        ((112, 84), 300, 2.0, FEW),
    ],
    ids=str,
)
def test_prompt_is_that_of_the_processor(
    models: dict[str, Model],
    start: Start,
    clip: Callable[..., Path],
    name: str,
    system: bool,
    case: Any,
) -> None:
    """The whole chain: chat template, sampling, resize, and the text that the processor writes."""
    if name != "qwen3_vl" and not system:
        pytest.skip("the chat template writes a system prompt of its own")
    size, frames, fps, settings = case
    question = "What happens in the video?"
    text = f"{PROMPTS[system]}<|im_start|>user\n{PADS}{question}<|im_end|>\n<|im_start|>assistant\n"
    output = start(name, video=settings)(text, [str(clip(frames, size, fps))])
    tokens = qwen_tokens(models[name].processor.tokenizer.decode(output.input_ids))
    prompt = Prompt(
        ShownModel(name, PUBLISHED[name]),
        PevlmConfig(),
        Request(
            size=size,
            settings=settings,
            duration=frames / fps,
            video_fps=fps,
            prompt_tokens=len(qwen_tokens(SYSTEM)) if system else 0,
            question_tokens=len(qwen_tokens(question)),
        ),
    )
    assert len(tokens) == prompt.length
    starts, ends = zip(*prompt.spans.steps, strict=True)
    assert tokens[prompt.spans.start - 1] == "<|vision_start|>"
    assert tokens[prompt.spans.end] == "<|vision_end|>"
    if name == "qwen3_vl":
        assert [tokens[i] for i in starts] == ["<"] * len(starts)
        assert [tokens[i - 1] for i in ends] == ["<|vision_end|>"] * len(ends)
        assert tokens.count("<|vision_end|>") == len(ends) + 1
    else:
        pads = tokens[prompt.spans.start : prompt.spans.end]
        assert pads == ["<|video_pad|>"] * len(pads)


def test_timestamps_of_long_videos() -> None:
    """Python's rounding stands for the server's, which is in fp32."""
    rng = random.Random(1)
    geometry = PUBLISHED["qwen3_vl"]
    settings = geometry.settings(FEW)
    for _ in range(300):
        total, fps = rng.randint(4, 9000), rng.choice([1.0, 23.976, 25.0, 29.97, 30.0, 60.0])
        video = geometry.video(total, fps, (112, 96), settings)
        indices = torch.linspace(0, total - 1, video.frames).round().long().tolist()
        texts = [
            f"<{(first + last) / fps / 2:.1f} seconds>"
            for first, last in zip(indices[::2], indices[1::2], strict=True)
        ]
        pads = min(video.steps) - 8  # the first step's text has the fewest tokens
        assert list(video.steps) == [pads + 2 + len(qwen_tokens(text)) for text in texts]
