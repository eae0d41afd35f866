"""Clips for families whose processors take any file."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from support.video import write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A file, by size and length; another width is another video."""
    directory = tmp_path_factory.mktemp("clips")

    @cache
    def write(width: int = 112, height: int = 84, seconds: float = 6) -> Path:
        path = directory / f"{width}x{height}-{seconds}.mp4"
        return write_video(path, seconds=seconds, size=(width, height), seed=width)

    return write
