"""Pixels in shared memory: each request has a name of its own for them, and nothing is left."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

mm_utils = pytest.importorskip("sglang.srt.managers.mm_utils")

from pevlm_sglang.media import shared  # noqa: E402

FOLDER = Path("/dev/shm")


def received(pointer: Any) -> torch.Tensor:
    """As SGLang's scheduler takes what it is sent."""
    pointer.__setstate__(pointer.__getstate__())
    tensor: torch.Tensor = pointer.materialize()
    return tensor


def own() -> set[Path]:
    """What this process has there: SGLang's names hold its number."""
    return set(FOLDER.glob(f"*_{os.getpid()}_*"))


@pytest.fixture
def before() -> set[Path]:
    gc.collect()
    return own()


def test_requests_share_one_memory(before: set[Path]) -> None:
    pixels = shared.empty((3, 4), torch.bfloat16)
    pixels.copy_(torch.arange(12).view(3, 4))
    expected = pixels.clone()
    first, second = shared.pointer(pixels), shared.pointer(pixels)
    names = {FOLDER / pointer.shm_name for pointer in (first, second)}
    assert len(names) == 2
    assert len({name.stat().st_ino for name in names}) == 1
    assert own() - before > names
    got = received(first)
    assert torch.equal(got, expected)
    got.zero_()  # a scheduler's, and nobody else's
    assert torch.equal(pixels, expected)
    del pixels  # the cache drops it, while a request is on its way
    assert torch.equal(received(second), expected)
    gc.collect()
    assert own() == before


def test_a_request_that_is_not_sent(before: set[Path]) -> None:
    pixels = shared.empty((2,), torch.float32)
    shared.pointer(pixels).close_and_unlink()
    del pixels
    gc.collect()
    assert own() == before


def test_other_tensors_have_no_pointer() -> None:
    pixels = shared.empty((4, 2), torch.float32)
    assert shared.pointer(torch.ones(4)) is None
    assert shared.pointer(pixels[:2]) is None  # a part of a file is none


def test_no_room(before: set[Path]) -> None:
    with pytest.raises(OSError, match=r"No space left|Cannot allocate|File too large"):
        shared.empty((1 << 50,), torch.uint8)
    assert own() == before
