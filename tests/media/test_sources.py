"""What a client's broken image costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

from pevlm_sglang.media.sources import SafeSources, check_path, reading


class Processor(SafeSources, BaseMultimodalProcessor):
    gpu_image_decode = False


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
