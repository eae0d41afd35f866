"""Clips: any cut gives the same pixels, and a clip is known by its own."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pevlm_sglang.media.clips import Clip, ClipBuffer, num_bytes, whole

ROWS = (2, 3)


def steps(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, *ROWS), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


def cut(video: torch.Tensor, length: int, order: Sequence[int] | None = None) -> tuple[Clip, ...]:
    buffer = ClipBuffer(len(video), ROWS, torch.float32, length, _room)
    for index in order or range(len(video)):
        buffer.step(index).copy_(video[index])
        buffer.note(index, video[index])
    return buffer.clips()


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@given(st.integers(1, 20), st.integers(1, 24), st.randoms())
def test_any_cut_and_any_order(count: int, length: int, rng: random.Random) -> None:
    video, order = steps(count), list(range(count))
    rng.shuffle(order)
    clips = cut(video, length, order)
    assert [clip.steps for clip in clips[:-1]] == [length] * (len(clips) - 1)
    assert sum(clip.steps for clip in clips) == count
    assert 0 < clips[-1].steps <= length
    pixels = torch.cat([clip.pixels for clip in clips])
    assert torch.equal(pixels, video.flatten(0, 1).float())
    assert num_bytes(clips) == pixels.nbytes
    assert [clip.digest for clip in cut(video, length)] == [clip.digest for clip in clips]


@pytest.mark.parametrize("changed", [0, 4, 5, 9])
def test_one_step_changes_its_clip_alone(changed: int) -> None:
    video, other = steps(10), steps(10)
    other[changed, 0, 0] ^= 1
    pairs = zip(cut(video, 5), cut(other, 5), strict=True)
    differ = [a.digest != b.digest for a, b in pairs]
    assert differ == [changed < 5, changed >= 5]


def test_a_longer_video_begins_with_the_same_clips() -> None:
    longer = steps(13)
    short = [clip.digest for clip in cut(longer[:10], 4)]
    long = [clip.digest for clip in cut(longer, 4)]
    assert short[:2] == long[:2]
    assert short[2] != long[2]  # it has more steps by then


def test_the_order_of_steps_counts() -> None:
    video = steps(4)
    [clip], [other] = cut(video, 4), cut(video.flip(0), 4)
    assert clip.digest != other.digest


def test_what_is_not_cut() -> None:
    pixels = torch.arange(6.0).view(2, 3)
    assert whole(pixels).digest == whole(pixels.clone()).digest != whole(pixels + 1).digest
    assert whole(pixels.T).digest != whole(pixels).digest
    assert whole(pixels.bfloat16()).digest != whole(pixels).digest
    assert whole(pixels.T).digest == whole(pixels.T.contiguous()).digest
