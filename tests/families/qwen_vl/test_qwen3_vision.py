"""Qwen3-VL's vision path in SGLang: tokens, positions, pixels and features are the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.exchange import IMAGE, SYSTEM, VIDEO, user
from support.families.qwen3_vl import Qwen3VLOracle, make_tiny_model
from support.families.qwen3_vl_upstream import run
from support.video import write_video

pytest.importorskip("sglang")

SIZES = ((128, 96), (84, 112), (224, 56), (54, 146))  # pixels; the first is not resized
CLIPS = [
    {"seconds": 6.5, "fps": 4.0, "size": SIZES[0]},
    {"seconds": 3.0, "fps": 29.97, "size": SIZES[1]},
    {"seconds": 31.0, "fps": 3.0, "size": SIZES[2]},
    {"seconds": 4.0, "fps": 12.5, "size": SIZES[3]},
]
REQUESTS = {
    "one": ("{}What?", (0,), 0),
    "portrait": ("{}", (1,), 0),
    "long": ("yes.{}", (2,), 0),
    "mixed": (f"{{}} and {IMAGE}, {{}}{IMAGE}?", (0, 3), 2),
    # From six rows of the grid on, SGLang interpolates position embeddings by another function.
    "seven": ("{}" * 7, (0, 1, 3, 0, 1, 3, 1), 0),
}
PLAIN = ["<|video_pad|>", VIDEO]  # without and with the chat template's wrapper


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    from PIL import Image

    directory = tmp_path_factory.mktemp("media")
    clips = [
        str(write_video(directory / f"{i}.mp4", seed=i, **clip)) for i, clip in enumerate(CLIPS)
    ]
    images = [str(directory / f"{i}.png") for i in range(2)]
    for i, path in enumerate(images):
        pixels = np.random.default_rng(i).integers(0, 256, (90 + 40 * i, 100, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return {
        f"{name} {wrapped}": {
            "text": SYSTEM + user(text.replace("{}", wrapped)),
            "videos": [clips[i] for i in videos],
            "images": images[:count],
        }
        for name, (text, videos, count) in REQUESTS.items()
        for wrapped in PLAIN
    }


@pytest.fixture(scope="module")
def served(model: Path, requests: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    return dict(zip(requests, run(model, list(requests.values())), strict=True))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Qwen3VLOracle:
    return Qwen3VLOracle(model)


@pytest.mark.parametrize("wrapped", PLAIN)
@pytest.mark.parametrize("name", REQUESTS)
def test_equals_the_reference(
    name: str,
    wrapped: str,
    requests: dict[str, Any],
    served: dict[str, dict[str, torch.Tensor]],
    oracle: Qwen3VLOracle,
) -> None:
    from PIL import Image

    request, got = requests[f"{name} {wrapped}"], served[f"{name} {wrapped}"]
    images = [Image.open(path).convert("RGB") for path in request["images"]]
    inputs = oracle.inputs(request["text"], [Path(path) for path in request["videos"]], images)
    ids = inputs["input_ids"]
    assert torch.equal(got["input_ids"], ids[0])
    assert torch.equal(got["positions"], oracle.positions(inputs, ids[0])[:, 0])
    assert torch.equal(got["positions"], _transformers_positions(oracle, inputs))
    for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        assert (f"pixels_{kind}" in got) == (pixels in inputs)
        if pixels in inputs:
            grid = inputs[f"{kind}_grid_thw"]
            assert torch.equal(got[f"grid_{kind}"], grid)
            assert torch.equal(got[f"pixels_{kind}"], inputs[pixels])
            expected = _transformers_features(oracle, inputs[pixels], grid)
            torch.testing.assert_close(got[f"features_{kind}"], expected, rtol=2e-5, atol=2e-5)
            assert expected.std(dim=0).min() > 0.05, "the clip has texture"


def _transformers_positions(oracle: Qwen3VLOracle, inputs: Any) -> torch.Tensor:
    """``[3, length]``, of transformers' own ``get_rope_index``."""
    config, ids = oracle.model.config, inputs["input_ids"]
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
    positions: torch.Tensor = oracle.model.model.get_rope_index(ids, kinds, **grids)[0]
    return positions[:, 0]


def _transformers_features(
    oracle: Qwen3VLOracle, pixels: torch.Tensor, grid: torch.Tensor
) -> torch.Tensor:
    """``[tokens, hidden × (1 + levels)]``"""
    with torch.no_grad():
        out = oracle.model.model.visual(pixels, grid_thw=grid, return_dict=True)
    return torch.cat([out.pooler_output, *out.deepstack_features], dim=1)
