"""The token counts of ``pevlm show`` are SGLang's, frame sampling and resizing included."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pevlm_sglang.cli import main
from pevlm_sglang.config import PevlmConfig
from pevlm_sglang.families import qwen_vl
from pevlm_sglang.families.qwen_vl import VideoKnobs, VideoProcessor
from pevlm_sglang.show import Model, Prompt, Request
from support.tiny import make_tiny_model

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
KNOBS = [
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


def sglang_frames(
    upstream: Any,
    monkeypatch: pytest.MonkeyPatch,
    total: int,
    fps: float,
    size: tuple[int, int],
    knobs: dict[str, Any],
    *,
    real_resize: bool = False,
) -> Any:
    """Frames that SGLang's own ``preprocess_video`` hands on, ``[frames, 3, height, width]``."""
    import torch

    class Decoder(upstream.VideoDecoderWrapper):
        avg_fps = fps

        def __init__(self) -> None:
            pass

        def __len__(self) -> int:
            return total

        def __del__(self) -> None:
            pass

        def get_frames_as_tensor(self, indices: list[int]) -> Any:
            blank = torch.zeros((), dtype=torch.uint8)
            return blank.expand(len(indices), size[1], size[0], 3)

    def resized(video: Any, new_size: list[int], **_: Any) -> Any:
        if 0 in new_size:
            raise ValueError("torchvision refuses an empty picture")
        return video[:, :, :1, :1].expand(-1, -1, *new_size)

    monkeypatch.setattr(upstream, "is_cpu", lambda: True)  # pinned memory needs a GPU
    if not real_resize:
        monkeypatch.setattr(upstream.torchvision.transforms.functional, "resize", resized)
    return asyncio.run(upstream.preprocess_video(Decoder(), video_config=knobs))[0]


def outcome(function: Any, *arguments: Any) -> Any:
    """What a function returns, or the name of a refusal."""
    try:
        return function(*arguments)
    except ValueError:
        return "refused"


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_sampled_frames_are_sglangs(upstream: Any, knobs: dict[str, Any]) -> None:
    rng = random.Random(0)
    cases = [(total, fps) for total in range(1, 12) for fps in (1.0, 2.0, 30.0)]
    cases += [(rng.randint(1, 9000), rng.choice([24.0, 25.0, 29.97, 30.0])) for _ in range(300)]
    refusals = 0
    for total, fps in cases:
        ours = outcome(qwen_vl.sampled_frames, total, fps, VideoKnobs.of(knobs))
        assert ours == outcome(upstream.smart_nframes, knobs, total, fps), (total, fps)
        refusals += ours == "refused"
    assert 0 < refusals < len(cases)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_size_is_sglangs(
    upstream: Any, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]
) -> None:
    """After SGLang's resize; transformers' one is switched off by wide bounds."""
    unbounded = VideoProcessor(min_pixels=1, max_pixels=10**12)
    counts = [2, 5, 901, 12_000]
    for size, total in itertools.product([*SIZES, (1, 201), (20_001, 101)], counts):
        arguments = (total, 3.0, size, knobs)
        theirs = outcome(lambda *a: sglang_frames(upstream, monkeypatch, *a).shape, *arguments)

        def ours(total: int, fps: float, size: tuple[int, int], _: Any) -> tuple[int, ...]:
            frames = qwen_vl.sampled_frames(total, fps, VideoKnobs.of(knobs))
            steps, rows, columns = qwen_vl.video_grid(
                frames, *size, VideoKnobs.of(knobs), unbounded
            )
            assert steps == frames // 2
            return frames, 3, rows * 14, columns * 14

        assert outcome(ours, *arguments) == theirs, (size, total)


@pytest.mark.parametrize("patch_size", [14, 16, 56])
@pytest.mark.parametrize("bounds", [(3136, 12_845_056), (3136, 1_003_520), (200_000, 210_000)])
def test_second_resize_is_that_of_transformers(
    upstream: Any, patch_size: int, bounds: tuple[int, int]
) -> None:
    from transformers import Qwen2VLVideoProcessor

    theirs = Qwen2VLVideoProcessor(
        patch_size=patch_size, min_pixels=bounds[0], max_pixels=bounds[1]
    )
    ours = VideoProcessor(patch_size=patch_size, min_pixels=bounds[0], max_pixels=bounds[1])
    wide = VideoKnobs.of({"max_pixels": 4_000_000, "total_pixels": 10**9})
    for width, height in SIZES:
        _, rows, columns = qwen_vl.video_grid(10, width, height, wide, VideoProcessor())
        between = (rows * 14, columns * 14)  # after SGLang's resize: wide bounds leave it alone
        grid = qwen_vl.video_grid(10, width, height, wide, ours)
        assert np.prod(grid) == theirs.get_num_of_video_patches(10, *between, {})


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), architecture=request.param)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_pixels": 3136, "max_pixels": 12_845_056},
        {"size": {"shortest_edge": 120_000, "longest_edge": 130_000}},
        {},
    ],
    ids=["published", "size", "none"],
)
def test_prompt_is_that_of_the_real_processor(
    upstream: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_model: Path,
    settings: dict[str, Any],
) -> None:
    """The whole chain: chat template, SGLang's sampling and resize, transformers' processor."""
    from sglang.srt.utils.hf_transformers.processor import get_processor

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        content = json.loads((model / name).read_text())
        kept = {k: v for k, v in content.items() if k not in ("min_pixels", "max_pixels")}
        (model / name).write_text(json.dumps({**kept, **settings}))
    processor = get_processor(str(model))
    text = {"type": "text", "text": "What happens in the video?"}
    chat = [{"role": "user", "content": [{"type": "video"}, text]}]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    encode = processor.tokenizer.encode
    for size, seconds, knobs in [
        ((320, 180), 3, {}),
        ((180, 320), 2.5, {"fps": 4}),
        ((101, 77), 4, {"max_pixels": 20_000, "min_pixels": 3136}),
        ((640, 480), 2, {"max_pixels": 2_000_000}),
        ((1600, 1000), 2, {"min_pixels": 1_100_000}),
    ]:
        video = sglang_frames(
            upstream, monkeypatch, round(seconds * 30), 30.0, size, knobs, real_resize=True
        )
        ids = processor(text=[rendered], videos=[video], return_tensors="pt")["input_ids"][0]
        pads = (ids == processor.video_token_id).nonzero().flatten().tolist()
        prompt = Prompt.build(
            Model.read(model),
            PevlmConfig(),
            Request(
                size=size,
                knobs=VideoKnobs.of(knobs),
                duration=seconds,
                prompt_tokens=len(encode("You are a helpful assistant.")),
                question_tokens=len(encode(text["text"])),
            ),
        )
        # Each is one token of Qwen's tokenizer, and may be more of the tiny model's.
        more = {word: len(encode(word)) - 1 for word in ("system", "user", "assistant")}
        start = prompt.spans.start + more["system"] + more["user"]
        assert pads == list(range(start, start + prompt.spans.end - prompt.spans.start))
        assert len(ids) == prompt.length + sum(more.values())
