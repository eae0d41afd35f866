"""What the families' processors share: the type in which pixels travel, and a medium's identity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

runtime = pytest.importorskip("sglang.srt.runtime_context")
from sglang.srt.managers.schedule_batch import Modality  # noqa: E402

from pevlm_sglang.families.processor import Medium, _tower_dtype  # noqa: E402


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


PIXELS = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source", [None, b"digest of a file"])
@pytest.mark.parametrize(
    "change",
    [
        {"pixels": PIXELS.bfloat16()},
        {"pixels": PIXELS[:1]},
        {"modality": Modality.IMAGE},
        {"data": {"frames": 1}},
        {"data": {}},
        {"source": b"digest of another"},
    ],
    ids=str,
)
def test_another_medium_is_another_to_the_caches(
    source: bytes | None, change: dict[str, Any]
) -> None:
    def identity(**changes: Any) -> int:
        medium = {
            "modality": Modality.VIDEO,
            "pixels": PIXELS,
            "data": {"frames": 2},
            "source": source,
            **changes,
        }
        return Medium(tokens=7, **medium).identity

    assert identity() == identity(pixels=PIXELS.clone())
    assert identity(**change) != identity()


def test_without_a_file_a_medium_is_known_by_its_pixels() -> None:
    def identity(pixels: torch.Tensor) -> int:
        return Medium(Modality.VIDEO, pixels, 7).identity

    assert identity(PIXELS.transpose(0, 1).contiguous().transpose(0, 1)) == identity(PIXELS)
    assert identity(PIXELS.flip(0)) != identity(PIXELS)
