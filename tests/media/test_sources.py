"""What a client's broken image costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.media import limits
from pevlm_sglang.media.identity import check_unchanged
from pevlm_sglang.media.sources import SafeSources, check_path, reading


class Processor(SafeSources, BaseMultimodalProcessor):
    gpu_image_decode = False


class Opened(VideoDecoderWrapper):
    """As SGLang opens a video, without a decoder."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __del__(self) -> None: ...


@pytest.mark.parametrize("kind", ["bomb", "missing", "directory", "pipe"])
def test_image_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("RGB", (64, 48)).save(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":  # which nobody writes to: reading it has no end
        os.mkfifo(path)
    with pytest.raises(ValueError, match="decompression bomb" if kind == "bomb" else "a file"):
        Processor._load_single_item(str(path), Modality.IMAGE)


@pytest.mark.parametrize("source", ["data:image/png;base64,AAAA", "AAAA", b"/", "http://a/b"])
def test_only_paths_are_looked_at(source: Any) -> None:
    check_path(source)


def test_what_the_server_lacks_is_not_the_client_s_fault() -> None:
    with pytest.raises(RuntimeError, match="no nvJPEG"), reading():
        raise RuntimeError("no nvJPEG")


@pytest.mark.parametrize("modality", [Modality.IMAGE, Modality.VIDEO])
def test_a_source_that_is_too_large_is_not_opened(
    modality: Modality, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "limits", limits.Limits(source_bytes=3))
    monkeypatch.setattr(BaseMultimodalProcessor, "_load_single_item", lambda *_, **__: "opened")
    assert Processor._load_single_item(b"\0" * 3, modality) == "opened"
    with pytest.raises(ValueError, match=r"at most 3 bytes .*got 4"):
        Processor._load_single_item(b"\0" * 4, modality)


def test_a_file_that_changes_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stamp is that of before: what was opened may be either of the two."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"one")

    def opens(source: str, *_: Any, content: bytes = b"") -> Opened:
        if content:
            path.write_bytes(content)
        return Opened(source)

    monkeypatch.setattr(BaseMultimodalProcessor, "_load_single_item", opens)
    check_unchanged(Processor._load_single_item(str(path), Modality.VIDEO))
    changed = Processor._load_single_item(str(path), Modality.VIDEO, content=b"another")
    with pytest.raises(ValueError, match="expected a file that stays as it is"):
        check_unchanged(changed)
