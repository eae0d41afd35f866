"""Qwen2-VL's and Qwen2.5-VL's frame spans, against the token stream of transformers' processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pevlm_sglang.families.qwen_vl import spans as qwen_vl
from pevlm_sglang.families.spans import SpanRule
from support.exchange import IMAGE, SYSTEM, VIDEO, user
from support.golden import describe
from support.tiny import ARCHITECTURES, make_tiny_model

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen_vl.txt"
Size = tuple[int, int, int]  # sampled frames, height and width in pixels


@pytest.fixture(scope="module", params=ARCHITECTURES)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoProcessor

    directory = tmp_path_factory.mktemp(request.param)
    return AutoProcessor.from_pretrained(
        make_tiny_model(directory, architecture=request.param, num_layers=1, vision_depth=1)
    )


def stream(processor: Any, text: str, videos: Sequence[Size], images: int = 0) -> Any:
    """The processor's ids and grids for a text with a placeholder for each video and image."""
    media: dict[str, Any] = {}
    if videos:
        media["videos"] = [torch.zeros(n, 3, h, w, dtype=torch.uint8) for n, h, w in videos]
        media["do_sample_frames"] = False
        media["videos_kwargs"] = {"min_pixels": 28 * 28}
    if images:
        media["images"] = [np.zeros((56, 84, 3), np.uint8)] * images
    return processor(text=[text], return_tensors="pt", **media)


def found_spans(processor: Any, inputs: Any) -> list[list[tuple[int, int]]]:
    """What the code under test makes of them, all videos in one item as SGLang has it."""
    ids = inputs["input_ids"][0].tolist()
    offsets = [(start, end - 1) for start, end in runs(ids, processor.video_token_id)]
    item = SimpleNamespace(
        is_video=lambda: True,
        is_image=lambda: False,
        offsets=offsets,
        model_specific_data={"video_grid_thw": inputs["video_grid_thw"]},
    )
    found = SpanRule(qwen_vl, 2).spans(SimpleNamespace(mm_items=[item]), ids, image_runs=False)
    assert all(video.frames_per_step == 2 for video in found)
    return [list(video.steps) for video in found]


def runs(ids: Sequence[int], token: int) -> list[tuple[int, int]]:
    marks = "".join("x" if i == token else "-" for i in ids)
    return [run.span() for run in re.finditer("x+", marks)]


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 64, 299, 300])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (84, 56), (56, 140)])
def test_every_placeholder_is_in_one_step(
    processor: Any, frames: int, height: int, width: int
) -> None:
    """Two frames a step, all steps alike, and nothing but placeholders in them."""
    inputs = stream(processor, f"{VIDEO}", [(frames, height, width)])
    ids = inputs["input_ids"][0].tolist()
    [steps] = found_spans(processor, inputs)
    assert len(steps) == -(-frames // 2)
    assert {end - start for start, end in steps} == {height * width // 28**2}
    covered = [i for start, end in steps for i in range(start, end)]
    assert covered == [i for i, token in enumerate(ids) if token == processor.video_token_id]


def test_two_videos_beside_an_image(processor: Any) -> None:
    text = SYSTEM + user(f"{VIDEO}{IMAGE}{VIDEO}")
    inputs = stream(processor, text, [(5, 56, 84), (4, 84, 28)], images=1)
    ids = inputs["input_ids"][0].tolist()
    first, second = found_spans(processor, inputs)
    assert [len(first), len(second)] == [3, 2]
    assert [first[0][1] - first[0][0], second[0][1] - second[0][0]] == [6, 3]
    covered = {i for start, end in (*first, *second) for i in range(start, end)}
    assert covered == {i for i, token in enumerate(ids) if token == processor.video_token_id}


def test_golden(processor: Any) -> None:
    """The stream and the spans, to be read; the same for both models."""
    text = SYSTEM + user(f"First {VIDEO}then {IMAGE}, {VIDEO}?")
    inputs = stream(processor, text, [(5, 56, 84), (4, 28, 56)], images=1)
    names = {processor.video_token_id: "pads", processor.image_token_id: "image pads"}
    ids = inputs["input_ids"][0].tolist()
    described = describe(processor.tokenizer, ids, found_spans(processor, inputs), names)
    assert described == GOLDEN.read_text()
