"""Keyframes in place of sampled frames: which, when, and the same pictures."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pevlm_sglang.families.internvl.sizes import InternVLGeometry
from pevlm_sglang.families.llava_video.sizes import LlavaGeometry
from pevlm_sglang.families.longvila.sizes import LongVilaGeometry
from pevlm_sglang.media.keyframes import in_place_of, keyframes, nearest

SAMPLERS = [InternVLGeometry(), LlavaGeometry(), LongVilaGeometry()]


def evenly(total: int, count: int) -> list[int]:
    """As Qwen's are sampled."""
    return torch.linspace(0, total - 1, count).round().long().tolist()


@given(
    total=st.integers(2, 5000),
    count=st.integers(2, 300),
    keys=st.sets(st.integers(0, 4999), max_size=200),
    sampler=st.integers(-1, len(SAMPLERS) - 1),
)
def test_nearest(total: int, count: int, keys: set[int], sampler: int) -> None:
    """Ascending, within half an interval; a sampled frame stays only where no keyframe is free."""
    count = min(count, total)
    known = sorted({0, *(key for key in keys if key < total)})
    indices = evenly(total, count)
    if sampler >= 0:
        geometry: Any = SAMPLERS[sampler]
        indices = geometry.indices(total, 25.0, geometry.settings({"num_frames": count}))
    got = nearest(indices, known, total)
    assert len(got) == len(indices)
    assert all(before < after for before, after in pairwise(got)) or len({*indices}) < count
    half = (indices[-1] - indices[0]) / (count - 1) / 2
    for index, frame in zip(indices, got, strict=True):
        near = [key for key in known if abs(key - index) <= half]
        if frame != index:
            assert frame in near
            assert abs(frame - index) == min(abs(key - index) for key in near)
        elif index not in known:
            assert {*near} <= {*got}  # a neighbour's, if there is one


@pytest.mark.parametrize(
    ("indices", "keys", "expected"),
    [
        ([0, 10, 20, 30], [0, 12, 18, 35], [0, 12, 18, 35]),
        ([0, 10, 20, 30], [0, 15], [0, 15, 20, 30]),  # as near to the next one
        ([0, 10, 20, 30], [0, 13, 9, 16], [0, 9, 16, 30]),
        ([0, 10, 20, 30], [], [0, 10, 20, 30]),
        ([0, 1, 2, 3], [0, 2], [0, 1, 2, 3]),
        ([50], [0, 90], [90]),  # a single frame: its interval is the video
    ],
)
def test_examples(indices: list[int], keys: list[int], expected: list[int]) -> None:
    assert nearest(indices, sorted(keys), 100) == expected


def test_keyframes_of_a_file(tmp_path: Path) -> None:
    """The decoder's own function for it is not a public one."""
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    path = tmp_path / "clip.mp4"
    source = ["-f", "lavfi", "-i", "testsrc2=size=96x64:rate=20:duration=6"]
    options = ["-c:v", "libx264", "-g", "40", "-sc_threshold", "0"]
    subprocess.run(["ffmpeg", "-v", "error", *source, *options, str(path)], check=True)
    video = VideoDecoderWrapper(str(path))
    assert keyframes(video) == [0, 40, 80]
    assert in_place_of(video, [0, 45, 90]) == [0, 40, 80]
    assert in_place_of(video, [0, 20, 40, 59, 99, 119]) == [0, 20, 40, 59, 99, 119]


def test_decoder_that_does_not_tell_is_refused() -> None:
    assert keyframes(object()) is None
    with pytest.raises(ValueError, match=r"frames: expected no wish, .* install torchcodec"):
        in_place_of(object(), [0, 1])
