"""The tokens of a LLaVA image, known before its features are: the launcher has no model.

Source: LLaVA-NeXT, ``prepare_inputs_labels_for_multimodal`` in llava/model/llava_arch.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any


def vision_config(hf_config: Any) -> Any:
    """The configuration of the vision tower, which ``mm_vision_tower`` names."""
    return _read_vision_config(hf_config.mm_vision_tower)


@functools.cache  # it may come from the hub, and every tiled image asks for it
def _read_vision_config(name: str) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    kind = CLIPVisionConfig if "clip" in name else SiglipVisionConfig
    return kind.from_pretrained(name)


def patches_per_side(hf_config: Any) -> int:
    """Features a side of a frame, before pooling."""
    config = vision_config(hf_config)
    return int(config.image_size // config.patch_size)


def image_tokens(hf_config: Any, patches: int, tiles: int, size: Sequence[int]) -> int:
    """Tokens of an image.

    Args:
        hf_config: of the model.
        patches: features a side of a tile.
        tiles: one, or one for the whole image and one for each part of it (anyres).
        size: width and height of the image in pixels.
    """
    if tiles == 1:
        return patches**2 + 1
    rows, columns = tile_grid(hf_config, size)
    height, width = _unpadded(rows * patches, columns * patches, size)
    height, width = shrunk(hf_config, height, width, patches) or (height, width)
    return patches**2 + height * (width + 1)


def tile_grid(hf_config: Any, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the tiles of an anyres image."""
    from sglang.srt.multimodal.mm_utils import get_anyres_image_grid_shape

    side = vision_config(hf_config).image_size
    grid = hf_config.image_grid_pinpoints
    columns, rows = get_anyres_image_grid_shape(tuple(size), grid, side)
    return int(rows), int(columns)


def shrunk(hf_config: Any, height: int, width: int, patches: int) -> tuple[int, int] | None:
    """The size to which the features of an anyres image are scaled down, or None.

    ``image_aspect_ratio`` ``anyres_max_9`` means at most about 9 tiles.
    """
    most = re.match(r"anyres_max_(\d+)", hf_config.image_aspect_ratio)
    if most is None:
        return None
    times = math.sqrt(height * width / (int(most[1]) * patches**2))
    return (int(height // times), int(width // times)) if times > 1.1 else None


def _unpadded(height: int, width: int, size: Sequence[int]) -> tuple[int, int]:
    from sglang.srt.multimodal.mm_utils import unpad_image_shape

    rows, columns = unpad_image_shape(height, width, tuple(size))
    return int(rows), int(columns)
