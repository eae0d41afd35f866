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

from pevlm_sglang.families.tile_layout import cut

# Of ImageNet, which the tower was trained with.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def tiles_of(picture: Image.Image, size: int, most: int) -> torch.Tensor:
    """``[tiles, 3, size, size]`` fp32 of a picture in RGB, an image or a frame alike.

    Args:
        size: pixels a side of a tile.
        most: tiles, the thumbnail aside.
    """
    pixels = np.stack([np.array(tile) for tile in cut(picture, size, most)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(_MEAN).div_(_STD)
