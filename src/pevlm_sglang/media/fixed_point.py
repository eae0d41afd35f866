"""The bicubic resize with antialiasing of pictures in uint8, on any device.

PyTorch's kernel for it runs on the CPU alone. It works in whole numbers: weights are rounded to
fixed point, and each of two passes, over columns and then over rows, rounds and clamps to uint8.
Sums of whole numbers know no order, so the same arithmetic gives the same bits on every device;
floating point would not.
Source: aten/src/ATen/native/cpu/UpSampleKernel.cpp (``compute_index_ranges_int16_weights``).
"""

from __future__ import annotations

from functools import lru_cache

import torch

_MOST_BITS = 22
_SUPPORT = 2.0  # of the cubic, in source pixels of a picture that is not made smaller
_WEIGHT_LIMIT = 1 << 15  # PyTorch's weights are int16


def bicubic(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Frames after the resize, on their device.

    Args:
        frames: ``[..., height, width]`` uint8.
        size: width and height.

    Returns:
        ``[..., height, width]`` uint8
    """
    return _resized(_resized(frames, -1, size[0]), -2, size[1])


def work_bytes(before: tuple[int, int], after: tuple[int, int]) -> int:
    """Of memory that :func:`bicubic` takes for a picture of one channel, its result included.

    Args:
        before, after: width and height.
    """
    between, result = after[0] * before[1], after[0] * after[1]
    # A sum and a product in int32, a tap and the result in uint8; the other pass's at once.
    return 10 * max(between, result) + between + result


def _resized(pixels: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    length = pixels.shape[dim]
    if length == size:
        return pixels
    places, weights, bits = _taps(length, size)
    places, weights = places.to(pixels.device), weights.to(pixels.device)
    shape = [*pixels.shape]
    shape[dim] = size
    total = torch.full(shape, 1 << (bits - 1), dtype=torch.int32, device=pixels.device)
    for place, weight in zip(places, weights, strict=True):
        total += pixels.index_select(dim, place) * (weight if dim == -1 else weight[:, None])
    return (total >> bits).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)  # each slice asks
def _taps(length: int, size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """From which pixels each new one is made, and with what weights.

    Returns:
        ``[taps, size]`` int64, ``[taps, size]`` int32 in fixed point, and its bits.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    center = scale * (torch.arange(size, dtype=torch.float64) + 0.5)
    first = (center - _SUPPORT * stretch + 0.5).long().clamp(min=0)
    end = (center + _SUPPORT * stretch + 0.5).long().clamp(max=length)
    places = first + torch.arange(int((end - first).max()))[:, None]
    weights = _cubic((places - center + 0.5) / stretch).where(places < end, 0)
    weights /= weights.sum(0)
    bits = 0  # as many as int16 has room for
    while bits < _MOST_BITS and int(0.5 + weights.max() * (2 << bits)) < _WEIGHT_LIMIT:
        bits += 1
    fixed = (weights * (1 << bits) + torch.where(weights < 0, -0.5, 0.5)).to(torch.int32)
    return places.clamp(max=length - 1), fixed, bits


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic with a = -0.5."""
    x, a = x.abs(), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
