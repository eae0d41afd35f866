"""What the families' processors share: the type in which pixels travel, and a clip's identity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

runtime = pytest.importorskip("sglang.srt.runtime_context")
from sglang.srt.managers.schedule_batch import Modality  # noqa: E402

from pevlm_sglang.families.placeholder_processor import Medium  # noqa: E402
from pevlm_sglang.families.processor import _tower_dtype  # noqa: E402
from pevlm_sglang.media.clips import whole  # noqa: E402


@pytest.mark.parametrize(
    ("asked", "checkpoint", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float32),  # to round to bfloat16 first would be another video
        ("auto", torch.float32, torch.float32),
        ("auto", None, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
        ("float16", torch.bfloat16, torch.float32),
    ],
)
def test_pixels_travel_as_the_tower_takes_them(
    asked: str, checkpoint: torch.dtype | None, expected: torch.dtype
) -> None:
    with runtime.get_context().override_server_args(device="cpu", dtype=asked):
        assert _tower_dtype(SimpleNamespace(dtype=checkpoint)) == expected


PIXELS = torch.zeros(2, 3, 4, 4)  # of which the digest cannot tell another type or shape


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": PIXELS.int()},
        {"pixels": PIXELS.view(2, 3, 2, 8)},
        {"pixels": PIXELS + 1},
        {"modality": Modality.IMAGE},
        {"data": {"frames": 1}},
        {"data": {}},
    ],
    ids=str,
)
def test_another_clip_is_another_to_the_caches(change: dict[str, Any]) -> None:
    def identity(**changes: Any) -> int:
        said = {"modality": Modality.VIDEO, "pixels": PIXELS, "data": {"frames": 2}, **changes}
        clip = whole(said["pixels"])
        return Medium(said["modality"], (clip,), tokens=7).identity(clip, said["data"])

    assert identity() == identity(pixels=PIXELS.clone())
    assert identity(**change) != identity()
