"""The layout of a LLaVA image's features.

Source: LLaVA-NeXT, ``prepare_inputs_labels_for_multimodal`` in llava/model/llava_arch.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.multimodal.mm_utils import get_anyres_image_grid_shape, unpad_image
from torch.nn import functional
from transformers import CLIPVisionConfig, SiglipVisionConfig


@functools.cache  # it may come from the hub, and every tiled image asks for it
def _vision_config(name: str) -> Any:
    kind = CLIPVisionConfig if "clip" in name else SiglipVisionConfig
    return kind.from_pretrained(name)


def patches_per_side(hf_config: Any) -> int:
    """Features a side of a frame, before pooling, by the tower that ``mm_vision_tower`` names."""
    config = _vision_config(hf_config.mm_vision_tower)
    return int(config.image_size // config.patch_size)


def lay_out_image(
    features: torch.Tensor, newline: torch.Tensor, hf_config: Any, size: Sequence[int]
) -> torch.Tensor:
    """The whole image, then, of an anyres image, the features of its tiles in rows, without what
    padding became, scaled down where they are too many, and a newline after each row.

    Args:
        features: ``[1, patches, hidden]``, or one more for each tile.
        newline: ``[hidden]``.
        hf_config: of the model.
        size: width and height of the image in pixels.

    Returns:
        ``[tokens, hidden]``
    """
    whole, tiles = features[0], features[1:]
    if not len(tiles):
        return torch.cat([whole, newline[None]])
    side = math.isqrt(len(whole))
    columns, rows = get_anyres_image_grid_shape(
        tuple(size),
        hf_config.image_grid_pinpoints,
        _vision_config(hf_config.mm_vision_tower).image_size,
    )
    tiles = tiles.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
    picture = unpad_image(tiles.reshape(-1, rows * side, columns * side), tuple(size))
    # anyres_max_9 means at most about 9 tiles.
    if (most := re.match(r"anyres_max_(\d+)", hf_config.image_aspect_ratio)) is not None:
        height, width = picture.shape[1:]
        times = math.sqrt(height * width / (int(most[1]) * side**2))
        if times > 1.1:
            target = int(height // times), int(width // times)
            picture = functional.interpolate(picture[None], target, mode="bilinear")[0]
    lines = picture.permute(1, 2, 0)
    lines = torch.cat([lines, newline.expand(len(lines), 1, -1)], dim=1)
    return torch.cat([whole, lines.flatten(0, 1)])
