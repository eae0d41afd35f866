"""A file is known by its content, and a clip by all that makes features of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pevlm_sglang.media.identity import (
    check_unchanged,
    file_stamp,
    identity,
    remember_stamp,
    source_digest,
)


def opened(source: Any) -> Any:
    """As SGLang's wrapper is left by ``SafeSources``."""
    video = SimpleNamespace(_source=source)
    remember_stamp(video, file_stamp(source))
    return video


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a clip.mp4"
    path.write_bytes(b"content" * 1000)
    return path


def test_content_counts_and_not_the_way(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy.mp4"
    other.write_bytes(path.read_bytes())
    known = source_digest(opened(str(path)))
    assert known == source_digest(opened(str(other))) == source_digest(opened(path.read_bytes()))
    other.write_bytes(path.read_bytes()[:-1] + b"x")
    assert source_digest(opened(str(other))) != known
    assert source_digest(SimpleNamespace()) is None


@pytest.mark.parametrize("change", ["in place", "replaced", "replaced, same time", "gone"])
def test_file_that_changes_while_it_is_read(path: Path, tmp_path: Path, change: str) -> None:
    """Frames of one file would go by the name of another."""
    video = opened(str(path))
    check_unchanged(video)
    stat, content = path.stat(), b"CONTENT" * 1000
    if change == "in place":
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "gone":
        path.unlink()
    else:
        other = tmp_path / "other"
        other.write_bytes(content)
        if "same time" in change:
            os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(path)
    with pytest.raises(ValueError, match="expected a file that stays as it is"):
        check_unchanged(video)


def test_stamp_of_what_is_no_file(path: Path) -> None:
    for source in (
        b"bytes",
        "data:video/mp4;base64,AAAA",
        "http://host/clip.mp4",
        "/no/such",
        None,
    ):
        assert file_stamp(source) is None
        check_unchanged(opened(source))
    stamp = file_stamp(str(path))
    assert stamp is not None
    assert stamp == file_stamp(f"file://{path}".replace(" ", "%20"))
    assert stamp == file_stamp(SimpleNamespace(url=str(path)))


def test_identity() -> None:
    parts = (b"digest", [1, 2], 2.0, torch.float32)
    assert identity(*parts) == identity(*parts) < 2**63
    others = [
        (b"digesT", *parts[1:]),
        (b"digest", [1, 3], *parts[2:]),
        (*parts[:3], torch.bfloat16),
    ]
    assert len({identity(*other) for other in (parts, *others)}) == 4
