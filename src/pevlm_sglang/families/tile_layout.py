"""How a picture is cut in tiles, in families that cut it: InternVL's rule, and VILA's."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def tile_layout(
    width: int, height: int, size: int, most: int, *, least: int = 1
) -> tuple[int, int]:
    """Columns and rows of the tiles of a picture: the ratio closest to its own; of equally close
    ones the largest of which the picture fills more than half.

    Args:
        width, height: of the picture.
        size: pixels a side of a tile.
        most, least: tiles.
    """
    best, closest = (1, 1), float("inf")
    for columns, rows in _layouts(least, most):
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * size * size * columns * rows
        if distance < closest or (distance == closest and fills):
            best, closest = (columns, rows), distance
    return best


@lru_cache(maxsize=16)  # every frame asks
def _layouts(least: int, most: int) -> tuple[tuple[int, int], ...]:
    layouts = {
        (i, j) for i in range(1, most + 1) for j in range(1, most // i + 1) if least <= i * j
    }
    return tuple(sorted(layouts, key=lambda layout: layout[0] * layout[1]))


def cut(image: Image.Image, size: int, most: int, *, least: int = 1) -> list[Image.Image]:
    """The tiles of a picture, row by row, and the whole of it where they are several; resized by
    PIL, bicubic. See :func:`tile_layout`."""
    columns, rows = tile_layout(*image.size, size, most, least=least)
    large = image.resize((size * columns, size * rows))
    tiles = [
        large.crop((x, y, x + size, y + size))
        for y in range(0, size * rows, size)
        for x in range(0, size * columns, size)
    ]
    return tiles if len(tiles) == 1 else [*tiles, image.resize((size, size))]


def num_tiles(width: int, height: int, size: int, most: int) -> int:
    """How many tiles :func:`cut` makes of a picture."""
    columns, rows = tile_layout(width, height, size, most)
    return columns * rows + (columns * rows > 1)
