"""A video is a sequence of clips: runs of whole steps, each with pixels and a digest of its own.

So a chunk of prefill encodes the clips that it overlaps and no others, and the prefix cache knows a
video's beginning whatever follows it, in this file or in a longer one. What is computed does not
depend on the cuts: towers take each step alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pevlm_sglang.media.stages import stage

Room = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Gives an empty tensor of a shape."""


def new(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """:data:`Room` in the process's own memory."""
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Clip:
    """Neighbouring steps of a video.

    Attributes:
        steps: how many.
        pixels: of the steps one after the other, as the tower takes them.
        digest: SHA-256 of what the pixels were made of, step by step.
    """

    steps: int
    pixels: torch.Tensor
    digest: bytes

    @property
    def num_bytes(self) -> int:
        return self.pixels.numel() * self.pixels.element_size()


class ClipBuffer:
    """The clips of a video while its steps come in, in any order and from several threads.

    Args:
        steps: of the video.
        rows: shape of a step's pixels.
        length: steps of a clip; the last one may have fewer.
        room: where pixels go.
    """

    def __init__(
        self, steps: int, rows: tuple[int, ...], dtype: torch.dtype, length: int, room: Room
    ) -> None:
        self._lengths = [min(length, steps - start) for start in range(0, steps, length)]
        self._pixels = [room((n * rows[0], *rows[1:]), dtype) for n in self._lengths]
        self._length, self._rows = length, rows[0]
        self._digests = [b""] * steps

    def step(self, index: int) -> torch.Tensor:
        """Where the pixels of a step go, ``[*rows]``."""
        clip, at = divmod(index, self._length)
        return self._pixels[clip][at * self._rows : (at + 1) * self._rows]

    def note(self, index: int, made_of: torch.Tensor) -> None:
        """What a step's pixels are made of; the same, for the same pixels in the same shape."""
        self._digests[index] = digest(made_of)

    def clips(self) -> tuple[Clip, ...]:
        """All of them, once all steps have come."""
        found, start = [], 0
        for steps, pixels in zip(self._lengths, self._pixels, strict=True):
            digests = self._digests[start : start + steps]
            found.append(Clip(steps, pixels, hashlib.sha256(b"".join(digests)).digest()))
            start += steps
        return tuple(found)


def digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 of a tensor's content."""
    with stage("hash"):
        content = tensor.contiguous().view(torch.uint8).cpu().numpy()
        return hashlib.sha256(content.data).digest()


def whole(pixels: torch.Tensor) -> Clip:
    """What is not cut, an image say, as one clip of one step."""
    return Clip(1, pixels, digest(pixels))


def num_bytes(clips: Sequence[Clip]) -> int:
    """Of all pixels."""
    return sum(clip.num_bytes for clip in clips)
