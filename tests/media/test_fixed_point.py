"""The resize in whole numbers is PyTorch's kernel for uint8, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from pevlm_sglang.media.fixed_point import bicubic

SIZES = [
    # width, height before and after
    (64, 48, 32, 24),
    (64, 48, 96, 80),
    (97, 61, 43, 61),
    (97, 61, 97, 28),
    (33, 211, 56, 56),
    (1, 1, 7, 5),
    (2, 300, 3, 5),
    (1280, 37, 644, 28),
    (37, 2160, 28, 336),
    (640, 36, 28, 1000),
]


def frames(width: int, height: int, kind: str) -> torch.Tensor:
    """``[2, 3, height, width]``; ``edges`` are where weights overshoot."""
    generator = torch.Generator().manual_seed(width * height)
    made = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    return made if kind == "noise" else (made > 127).to(torch.uint8) * 255


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_pytorch(size: tuple[int, int, int, int], kind: str) -> None:
    before = frames(*size[:2], kind)
    for form in (torch.contiguous_format, torch.channels_last):
        kept = before.contiguous(memory_format=form)
        expected = interpolate(kept, (size[3], size[2]), mode="bicubic", antialias=True)
        assert torch.equal(bicubic(kept, size[2:]), expected)


def test_same_size_is_left_alone() -> None:
    before = frames(8, 6, "noise")
    assert bicubic(before, (8, 6)) is before


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_a_gpu(size: tuple[int, int, int, int]) -> None:
    before = frames(*size[:2], "edges")
    assert torch.equal(bicubic(before.cuda(), size[2:]).cpu(), bicubic(before, size[2:]))
