"""Frames in place of a file: what is taken for them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

from pevlm_sglang.media.frame_arrays import frame_arrays
from pevlm_sglang.media.identity import source_digest
from pevlm_sglang.media.sources import SafeSources
from pevlm_sglang.media.video_file import decoded, length_and_rate
from pevlm_sglang.media.wishes import Wishes


class Processor(SafeSources, BaseMultimodalProcessor):
    gpu_image_decode = False


FRAMES = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), np.uint8)
FIRST = FRAMES.transpose(0, 3, 1, 2)
SAME: dict[str, Any] = {
    "pictures": [Image.fromarray(frame) for frame in FRAMES],
    "pictures with alpha": tuple(Image.fromarray(frame).convert("RGBA") for frame in FRAMES),
    "array": FRAMES,
    "channels first": FIRST,
    "tensor": torch.from_numpy(FRAMES),
    "of qwen-vl-utils": torch.from_numpy(FIRST.copy()).float(),
    "bfloat16": torch.from_numpy(FIRST.copy()).bfloat16(),
    "int64": FRAMES.astype(np.int64),
    "arrays in a list": list(FRAMES),
    "tensors in a list": list(torch.from_numpy(FIRST.copy())),
    "of both kinds": [FRAMES[0], *torch.from_numpy(FIRST[1:].copy())],
}


@pytest.mark.parametrize("form", SAME)
def test_the_same_frames(form: str) -> None:
    video = Processor._load_single_item(SAME[form], Modality.VIDEO)
    assert length_and_rate(video) == (4, 2.0)
    assert video.frame_shape == (6, 8)
    assert np.array_equal(decoded(video, [0, 2, 3]), FRAMES[[0, 2, 3]])
    assert source_digest(video) == source_digest(frame_arrays(FRAMES))


def test_other_frames_are_another_video() -> None:
    other = FRAMES.copy()
    other[3, 5, 7, 2] ^= 1
    assert source_digest(frame_arrays(other)) != source_digest(frame_arrays(FRAMES))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{}], "expected pictures in a list"),
        (["/a.png"], "expected pictures in a list"),
        ([None], "expected pictures in a list"),
        ([1], "expected pictures in a list"),
        ([[[]]], "expected pictures in a list"),
        ([], "expected at least one frame, got an empty list"),
        (np.zeros((0, 6, 8, 3), np.uint8), "expected at least one frame"),
        (FRAMES[0], "expected four dimensions"),
        ([FRAMES], "expected three dimensions"),
        (FRAMES[..., :2], "expected three channels"),
        ([FRAMES[0], FRAMES[1][:5]], "expected frames of one size, got 8x5 and 8x6"),
        (FRAMES / 255, "pixels that are not normalized"),
        (torch.full((1, 3, 6, 8), float("nan")), "pixels that are not normalized"),
        (FRAMES.astype(np.int32) - 1, "whole numbers from 0 to 255"),
        (FRAMES.astype(np.int32) + 256, "whole numbers from 0 to 255"),
        (FRAMES > 3, "expected uint8 in an array of frames, got bool"),
        (FRAMES.astype(complex), "got complex128"),
    ],
)
def test_no_frames(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Processor._load_single_item(source, Modality.VIDEO)


@pytest.mark.parametrize("source", ["a.mp4", b"a", {"format": "processor_output"}, None, 1])
def test_everything_else_is_left_alone(source: Any) -> None:
    assert frame_arrays(source) is None


def test_wishes() -> None:
    video = frame_arrays(FRAMES)
    assert video is not None
    assert video.heed(Wishes(max_pixels=9), 4) == Wishes(max_frames=4, max_pixels=9)
    assert video.avg_fps == 2.0
    video.heed(Wishes(fps=0.5), 4)
    assert video.avg_fps == 0.5
    with pytest.raises(ValueError, match="at most 3 frames in a list, the server's max_frames"):
        video.heed(Wishes(), 3)
    with pytest.raises(ValueError, match="max_frames: expected an encoded video"):
        video.heed(Wishes(max_frames=4), 4)
