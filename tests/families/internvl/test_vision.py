"""InternVL3.5 without a server: pixels, vision tower and projector against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pevlm_sglang.families.internvl.sizes import PUBLISHED
from pevlm_sglang.families.internvl.tiles import tiles_of
from pevlm_sglang.families.tile_layout import tile_layout
from support.clips import whole
from support.families import internvl as reference
from support.families import internvl_upstream
from support.families.internvl import VIDEO
from support.families.internvl_upstream import processor

Clip = Callable[..., str]


# --- Pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 64), (640, 360), (360, 640), (449, 447), (1280, 720)])
def test_pixels_of_a_video(model: Path, clip: Clip, size: tuple[int, int]) -> None:
    path = clip(size[0] // 2 * 2, size[1] // 2 * 2)
    with processor(model, video={"num_frames": 5}) as process:
        (item,) = process(f"{VIDEO}?", [path]).mm_items
    expected = torch.cat([reference.load(f, max_tiles=1) for f in reference.sample(path, 5)])
    assert torch.equal(item.feature, expected)


@pytest.mark.parametrize("most", [1, 2, 6, 12])
@pytest.mark.parametrize("size", [(40, 40), (500, 500), (900, 900), (640, 200), (300, 1100)])
def test_pixels_of_an_image(size: tuple[int, int], most: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise)
    tiles = tiles_of(picture, 448, most)
    assert torch.equal(tiles, reference.load(picture, most))


@example(150, 100, 2)  # as far from one tile as from two
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 12))
def test_tile_layout(width: int, height: int, most: int) -> None:
    assert tile_layout(width, height, 448, most) == reference.tile_grid(width, height, most)


@given(st.integers(1, 100_000), st.integers(1, 768))
def test_indices(total: int, count: int) -> None:
    """The middles of equal segments, in order and in the video; a short one repeats frames."""
    geometry = PUBLISHED["internvl3_5"]
    settings = geometry.settings({"num_frames": count})
    indices = geometry.indices(total, 30.0, settings)
    assert indices == sorted(indices)
    assert len(indices) == count
    assert 0 <= indices[0] <= indices[-1] <= max(0, total - 1)
    middles = (np.arange(count) + 0.5) * (total - 1) / count
    assert np.abs(indices - middles).max() <= 1.5


def test_corrections_matter(model: Path, clip: Clip) -> None:
    """On a clip with texture, upstream's pixels are far from the reference's."""
    with processor(model) as process:
        [video] = whole(process(f"{VIDEO}?", [clip(640, 360)]).mm_items)
    ours = video.pixels
    with processor(model, upstream=True) as process:
        theirs = process(f"{VIDEO}?", [clip(640, 360)]).mm_items[0].feature
    assert float((ours - theirs.float()).abs().mean()) > 0.3


# --- Vision tower and projector ------------------------------------------------------------------


def test_tower_layer_by_layer(model: Path, clip: Clip) -> None:
    oracle = reference.InternVLOracle(model)
    frames = reference.sample(Path(clip(640, 360)), 3)
    tiles = torch.cat([reference.load(frame, max_tiles=1) for frame in frames])
    found = internvl_upstream.run(model, tiles)
    with torch.no_grad():
        tower = oracle.model.model.vision_tower(tiles, output_hidden_states=True)
        expected = [*tower.hidden_states, oracle.features(tiles)]
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
