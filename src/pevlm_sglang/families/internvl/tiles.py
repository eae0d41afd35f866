"""A video or an image → what InternVL's vision tower takes, as published.

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

import numpy as np
import torch
from PIL import Image

from pevlm_sglang.families.tile_layout import tile_layout

# Of ImageNet, which the tower was trained with.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Preparation:
    """How frames are chosen, named and turned into tiles: ``load_video`` and ``load_image`` of the
    model card.

    Args:
        size: pixels a side of a tile.
        dtype: of the tiles, once computed in fp32.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._size = size
        self._dtype = dtype

    def label(self, number: int) -> str:
        """The text before frame ``number``, counted from 1."""
        return f"Frame{number}: "

    def indices(self, total: int, count: int) -> list[int]:
        """Which ``count`` of a video's ``total`` frames are sampled; a short one repeats some."""
        segment = (total - 1) / count
        return [int(segment / 2 + round(segment * i)) for i in range(count)]

    def tiles(self, picture: Image.Image, most: int) -> torch.Tensor:
        """``[tiles, 3, size, size]`` of a picture in RGB, an image or a frame alike.

        Args:
            most: tiles, the thumbnail aside.
        """
        columns, rows = tile_layout(picture.width, picture.height, self._size, most)
        size = self._size
        whole = picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
        corners = [(x * size, y * size) for y in range(rows) for x in range(columns)]
        tiles = [whole.crop((x, y, x + size, y + size)) for x, y in corners]
        if len(tiles) > 1:
            tiles.append(picture.resize((size, size), Image.Resampling.BICUBIC))
        return torch.stack([self._normalised(tile) for tile in tiles])

    def _normalised(self, tile: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 255
        return ((pixels - _MEAN) / _STD).to(self._dtype)
