"""What a client's broken image costs."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.media import limits
from pevlm_sglang.media.download import Downloaded
from pevlm_sglang.media.identity import check_unchanged, source_digest
from pevlm_sglang.media.sources import SafeSources, check_path, reading
from pevlm_sglang.media.video_file import decoded
from support.video import write_video


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With ``clip.mp4``."""
    write_video(tmp_path / "clip.mp4", seconds=1, size=(64, 48))
    return tmp_path


def hls(place: object) -> bytes:
    head = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1.0,\n"
    return head + f"{place}\n#EXT-X-ENDLIST\n".encode()


TAGS = b"ID3\3\0\0\0\0\0\n" + bytes(10)
PLAYLISTS: dict[str, Callable[[Path], bytes]] = {
    "concat": lambda clip: b"ffconcat version 1.0\nfile clip.mp4\n",
    "hls": hls,
    "hls, file": lambda clip: hls(f"file://{clip}"),
    "dash": lambda clip: b'<?xml version="1.0"?>\n<MPD profiles="x"></MPD>',
    "sdp": lambda clip: b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "tags": lambda clip: TAGS + b"ffconcat version 1.0\nfile clip.mp4\n",
    "long": lambda clip: b"\n" * 100_000 + hls(clip),
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("downloaded", [False, True])
def test_a_file_that_names_others(kind: str, downloaded: bool, folder: Path) -> None:
    """FFmpeg would open them, wherever they are; some of these it does, see below."""
    content = PLAYLISTS[kind](folder / "clip.mp4")
    if downloaded:
        source: str = Downloaded()
        source.write(content)
    else:
        source = str(folder / "playlist")
        Path(source).write_bytes(content)
    with pytest.raises(ValueError, match="expected a file that holds its frames, got a playlist"):
        Processor._load_single_item(source, Modality.VIDEO)


def test_why_playlists_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By path another file is read; from memory none, so that there nothing is looked for."""
    monkeypatch.chdir(folder)
    for kind in ("concat", "tags"):
        (folder / "playlist").write_bytes(PLAYLISTS[kind](folder))
        assert len(VideoDecoderWrapper(str(folder / "playlist"))) == 4
    for make in PLAYLISTS.values():
        with pytest.raises(ValueError, match="Could not decode video"):
            Processor._load_single_item(make(folder / "clip.mp4"), Modality.VIDEO)


@pytest.mark.parametrize("downloaded", [False, True])
def test_a_file_is_not_read_into_memory(folder: Path, downloaded: bool) -> None:
    """Neither to open it, nor for its digest. (What FFmpeg reads is not seen here.)"""
    path, large = folder / "clip.mp4", 32 << 20
    with open(path, "ab") as file:  # a box of an MP4 that nobody reads
        file.write((large + 8).to_bytes(4, "big") + b"free" + bytes(large))
    source: str = Downloaded() if downloaded else str(path)
    if isinstance(source, Downloaded):
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                source.write(piece)
    tracemalloc.start()
    try:
        video = Processor._load_single_item(source, Modality.VIDEO)
        assert len(decoded(video, [0, 3])) == 2
        digest = source_digest(video)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert digest == hashlib.sha256(path.read_bytes()).digest()
    assert video._source is source
    assert video._source_bytes is None


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
