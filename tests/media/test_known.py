"""Files that were read before are known by what the file system says of them, while that holds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from pevlm_sglang.media import limits
from pevlm_sglang.media.identity import file_stamp, remember_stamp
from pevlm_sglang.media.keyframes import keyframes
from pevlm_sglang.media.known import KnownVideo, KnownVideos


class Video:
    avg_fps, frame_shape = 25.0, (4, 6)

    def __init__(self, source: Any) -> None:
        remember_stamp(self, file_stamp(source))

    def __len__(self) -> int:
        return 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"content")
    time.sleep(0.15)
    return path


def test_a_known_file(path: Path) -> None:
    known = KnownVideos()
    assert known.find("t", str(path)) == str(path)
    known.remember("t", Video(str(path)), b"digest", [0, 5])
    for source in (str(path), f"file://{path}", SimpleNamespace(url=str(path))):
        found = known.find("t", source)
        assert isinstance(found, KnownVideo)
        assert found.source is source
        assert (len(found), found.avg_fps, found.frame_shape) == (10, 25.0, (4, 6))
        assert found.facts.digest == b"digest"
        assert keyframes(found) == [0, 5]
    assert known.find("another tenant", str(path)) == str(path)
    known.clear()
    assert known.find("t", str(path)) == str(path)


@pytest.mark.parametrize("change", ["content", "same size and time", "replaced", "gone"])
def test_another_file(path: Path, tmp_path: Path, change: str) -> None:
    known = KnownVideos()
    known.remember("t", Video(str(path)), b"digest", None)
    stat = path.stat()
    if change == "content":
        path.write_bytes(b"another content")
    elif change == "same size and time":
        path.write_bytes(b"CONTENT")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "replaced":
        other = tmp_path / "other"
        other.write_bytes(b"CONTENT")
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(path)
    else:
        path.unlink()
    assert known.find("t", str(path)) == str(path)


def test_a_young_file_is_not_known(tmp_path: Path) -> None:
    """The next content of its name may come within one tick of the file system's clock."""
    path, known = tmp_path / "clip.mp4", KnownVideos()
    path.write_bytes(b"content")
    known.remember("t", Video(str(path)), b"digest", None)
    assert known.find("t", str(path)) == str(path)


def test_a_known_file_by_a_path_that_nobody_may_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, other = KnownVideos(), tmp_path / "elsewhere"
    other.mkdir()
    known.remember("t", Video(str(path)), b"digest", None)
    allowed = limits.Limits(paths=(str(other),))
    monkeypatch.setattr(limits, "limits", allowed)
    with pytest.raises(ValueError, match=r"clip\.mp4"):
        known.find("t", str(path))


def test_what_is_no_file() -> None:
    known = KnownVideos()
    for source in (b"bytes", "http://host/clip.mp4", "data:video/mp4;base64,AAAA", None):
        known.remember("t", Video(source), b"digest", None)
        assert known.find("t", source) is source


def test_as_many_as_there_is_room_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pevlm_sglang.media.known._MOST", 2)
    known, video = KnownVideos(), Video(str(path))
    for tenant in "abc":
        known.remember(tenant, video, b"digest", None)
    assert [isinstance(known.find(tenant, str(path)), KnownVideo) for tenant in "abc"] == [
        False,
        True,
        True,
    ]
