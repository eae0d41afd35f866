"""A video or an image → what InternVL's vision tower takes: as published, or as SGLang has it.

The reference of ``InternVLChatModel`` checkpoints is the code that their model card publishes with
them: ``load_video``, and ``chat`` for the prompt. SGLang 0.5.23 differs in all of it
(sglang/srt/multimodal/processors/internvl.py):

- it takes frames from the first to the very last, where the reference takes the middle of each of
  ``n`` equal segments;
- it resizes without antialiasing, after normalisation, where the reference resizes the 8-bit
  picture with antialiasing: fine texture aliases, the more the larger the picture;
- it rounds pixels to bfloat16, whatever the model computes in;
- it writes ``Frame 1: ``, where the reference writes ``Frame1: ``;
- of equally close tile layouts it takes the largest, however small the picture, and a video's
  tiles come without a thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

# Of ImageNet, which the tower was trained with.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

TilePreprocess = Callable[..., torch.Tensor]


class Preparation(Protocol):
    """How frames are chosen, named and turned into tiles."""

    def label(self, number: int) -> str:
        """The text before frame ``number``, counted from 1."""

    def indices(self, total: int, count: int) -> list[int]:
        """Which ``count`` of a video's ``total`` frames are sampled; a short one repeats some."""

    def tiles(self, picture: Image.Image, most: int, *, is_image: bool) -> torch.Tensor:
        """``[tiles, 3, size, size]`` of a picture.

        Args:
            picture: RGB.
            most: tiles, the thumbnail aside.
            is_image: or a frame of a video.
        """


class Published:
    """The reference: ``load_video`` and ``load_image`` of the model card.

    Args:
        size: pixels a side of a tile.
        dtype: of the tiles, once computed in fp32.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._size = size
        self._dtype = dtype

    def label(self, number: int) -> str:
        return f"Frame{number}: "

    def indices(self, total: int, count: int) -> list[int]:
        segment = (total - 1) / count
        return [int(segment / 2 + round(segment * i)) for i in range(count)]

    def tiles(self, picture: Image.Image, most: int, *, is_image: bool) -> torch.Tensor:
        columns, rows = tile_layout(picture.width, picture.height, self._size, most)
        size = self._size
        whole = picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
        corners = [(x * size, y * size) for y in range(rows) for x in range(columns)]
        tiles = [whole.crop((x, y, x + size, y + size)) for x, y in corners]
        if len(tiles) > 1:  # of an image and of a frame alike
            tiles.append(picture.resize((size, size), Image.Resampling.BICUBIC))
        return torch.stack([self._normalised(tile) for tile in tiles])

    def _normalised(self, tile: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 255
        return ((pixels - _MEAN) / _STD).to(self._dtype)


class Upstream:
    """What SGLang does by itself, for ``--pevlm-vision-fixes false``.

    Args:
        preprocess: SGLang's ``InternVLProcessor.dynamic_preprocess``.
        device: where it runs.
    """

    def __init__(self, preprocess: TilePreprocess, device: Any) -> None:
        self._preprocess = preprocess
        self._device = device

    def label(self, number: int) -> str:
        return f"Frame {number}: "

    def indices(self, total: int, count: int) -> list[int]:
        if count == 1:
            return [0]
        indices: list[int] = np.linspace(0, total - 1, num=count, dtype=int).tolist()
        return indices

    def tiles(self, picture: Image.Image, most: int, *, is_image: bool) -> torch.Tensor:
        mean, std = _MEAN.to(self._device), _STD.to(self._device)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self._device).float() / 255
        return self._preprocess(
            (pixels - mean) / std, image_size=448, max_num=most, use_thumbnail=is_image
        )


def tile_layout(
    width: int, height: int, size: int, most: int, *, least: int = 1
) -> tuple[int, int]:
    """Columns and rows of the tiles of a picture: the ratio closest to its own; of equally close
    ones the largest of which the picture fills more than half. VILA's rule is the same.

    Args:
        width, height: of the picture.
        size: pixels a side of a tile.
        most, least: tiles.
    """
    layouts = sorted(
        {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if least <= i * j <= most},
        key=lambda layout: layout[0] * layout[1],
    )
    best, closest = (1, 1), float("inf")
    for columns, rows in layouts:
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * size * size * columns * rows
        if distance < closest or (distance == closest and fills):
            best, closest = (columns, rows), distance
    return best
