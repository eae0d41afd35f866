"""Vision features are Hugging Face's, for videos of several steps and sizes in one forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.families import qwen_vl_tower
from support.families.qwen_vl import QwenVLOracle
from support.tiny import make_tiny_model
from support.video import write_video

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2_vl"])
def test_features(tmp_path: Path, architecture: str) -> None:
    """Windows and full attention in turn, with windows that the frames do not fill."""
    model = make_tiny_model(
        tmp_path / "model",
        architecture=architecture,
        num_layers=1,
        vision_depth=4,
        fullatt_block_indexes=[1, 3],
    )
    clips = [
        write_video(tmp_path / "wide.mp4", seconds=7, fps=7.5, size=(322, 182)),
        write_video(tmp_path / "tall.mp4", seconds=3, size=(84, 202), seed=3),
    ]
    oracle = QwenVLOracle(model)
    inputs = oracle.inputs(f"{VIDEO} and {VIDEO}", clips)
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    with torch.no_grad():
        reference = oracle.model.model.get_video_features(pixels, grid, return_dict=True)
    expected = torch.cat([*reference.pooler_output])
    features = qwen_vl_tower.run(model, pixels, grid)
    assert (features["corrected"] - expected).abs().max() < 3e-5 * expected.abs().max()
    whole_video = (features["upstream"] - expected).abs().max()
    if architecture == "qwen2_5_vl":
        assert whole_video > 1e-2, "what is corrected is there to be corrected"
    else:
        assert torch.equal(features["upstream"], features["corrected"])
