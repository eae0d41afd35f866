"""A tiny InternVL, and clips of noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.families.internvl_model import make_tiny_model
from support.video import write_video

Clip = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A path, by size and seed."""
    directory = tmp_path_factory.mktemp("clips")

    def write(width: int = 96, height: int = 64, seed: int = 0, seconds: float = 3) -> str:
        path = directory / f"{width}-{height}-{seed}-{seconds}.mp4"
        if not path.exists():
            write_video(path, seconds=seconds, size=(width, height), seed=seed)
        return str(path)

    return write
