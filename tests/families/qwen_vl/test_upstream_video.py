"""Corrections that a release of SGLang makes needless step aside."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.multimodal.processors import qwen_vl as upstream

from pevlm_sglang.families import registry
from pevlm_sglang.families.qwen_vl import VIDEO, upstream_video
from pevlm_sglang.families.qwen_vl.sizes import PUBLISHED
from pevlm_sglang.families.qwen_vl.tower import split_into_steps
from support.processor import without_pinned_memory

MODELS = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def config(model: str) -> SimpleNamespace:
    geometry = PUBLISHED[model]
    vision = SimpleNamespace(
        patch_size=geometry.patch_size, spatial_merge_size=2, temporal_patch_size=2
    )
    return SimpleNamespace(model_type=model, architectures=[MODELS[model]], vision_config=vision)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    upstream_video.is_the_references.cache_clear()
    with without_pinned_memory():
        yield
    upstream_video.is_the_references.cache_clear()


async def as_the_reference(
    video: Any, image_factor: int = 28, video_config: dict[str, Any] | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A release of SGLang that has mended sampling and resizing; written on qwen-vl-utils."""
    from qwen_vl_utils.vision_process import smart_nframes, smart_resize
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    total, rate = len(video), video.avg_fps
    count = smart_nframes(dict(video_config or {}), total, rate)
    indices = torch.linspace(0, total - 1, count).round().long().tolist()
    frames = video.get_frames_as_tensor(indices).permute(0, 3, 1, 2)
    token = image_factor**2
    least, most = 128 * token, 768 * token
    height, width = smart_resize(
        *frames.shape[-2:], factor=image_factor, min_pixels=least, max_pixels=most
    )
    frames = resize(frames, [height, width], InterpolationMode.BICUBIC, antialias=True)
    return frames, {"fps": rate, "total_num_frames": total, "frames_indices": indices}


@pytest.mark.parametrize("model", MODELS)
def test_this_release_needs_them(model: str) -> None:
    hf_config = config(model)
    assert set(VIDEO) <= set(registry.family_of(hf_config.architectures).corrected(hf_config))


@pytest.mark.parametrize("model", MODELS)
def test_a_mended_release_does_not(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Qwen3-VL this is the double resize: frames come in multiples of its own 32 pixels."""
    monkeypatch.setattr(upstream, "preprocess_video", as_the_reference)
    hf_config = config(model)
    said = registry.family_of(hf_config.architectures).corrected(hf_config)
    assert not set(VIDEO) & set(said)


@pytest.mark.parametrize("broken", ["index", "pixel", "factor"])
def test_half_mended_is_not_mended(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nearly(video: Any, image_factor: int = 28, **options: Any) -> Any:
        factor = 28 if broken == "factor" else image_factor
        frames, metadata = await as_the_reference(video, factor, **options)
        if broken == "pixel":
            frames[-1, 0, 0, 0] ^= 1
        if broken == "index":
            metadata["frames_indices"][-1] -= 1
        return frames, metadata

    monkeypatch.setattr(upstream, "preprocess_video", nearly)
    hf_config = config("qwen3_vl")
    assert set(VIDEO) <= set(registry.family_of(hf_config.architectures).corrected(hf_config))


def test_the_towers_correction_does_nothing_to_a_mended_tower() -> None:
    """It hands over rows of one step; a tower that makes them itself finds them made."""
    grid = torch.tensor([[3, 4, 6], [1, 2, 2]])
    once = split_into_steps(grid)
    assert once.tolist() == [[1, 4, 6]] * 3 + [[1, 2, 2]]
    assert torch.equal(split_into_steps(once), once)
