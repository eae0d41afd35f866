"""Videos in slices: the same frames, side by side, within a bound, and in order."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pevlm_sglang.media.keyframes import in_place_of
from pevlm_sglang.media.slices import SLICE_FRAMES, Reader, all_of, segments

MIB = 1 << 20


class Video:
    """The part of SGLang's ``VideoDecoderWrapper`` that is read; frame i is full of i.

    Args:
        seconds: that a frame takes to decode.
        broken_at: first frame that cannot be decoded.
    """

    def __init__(
        self, size: tuple[int, int] = (2, 2), seconds: float = 0.0, broken_at: int | None = None
    ) -> None:
        self.frame_shape, self.seconds, self.broken_at = size, seconds, broken_at
        self.parts: list[int] = []

    def get_frames_at(self, indices: Sequence[int]) -> np.ndarray:
        time.sleep(self.seconds * len(indices))
        if self.broken_at is not None and indices[-1] >= self.broken_at:
            raise ValueError("no more packets")
        self.parts.append(len(indices))
        return np.stack([np.full((2, 2, 3), index, np.int64) for index in indices])


class Copies(Video):
    """One that is opened anew for every part, as a file is."""

    def __init__(self, source: Any, device: str = "cpu") -> None:
        super().__init__(**source.get("options", {}))
        self._source = source
        source.setdefault("opened", []).append(self)


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader(3, 512 * MIB)
    yield made
    made.shutdown()


def collect(reader: Reader, video: Any, indices: Sequence[int], multiple: int = 1) -> list[int]:
    """The frames as they arrive at their places."""
    places = [-1] * len(indices)

    def work(start: int, frames: torch.Tensor) -> None:
        for at, frame in enumerate(frames, start):
            places[at] = int(frame[0, 0, 0])

    asyncio.run(reader.read(video, indices, work, multiple=multiple))
    return places


# --- The parts -------------------------------------------------------------------------------


@given(
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=300),
    keys=st.none() | st.sets(st.integers(1, 6000), max_size=60),
    step=st.integers(1, 32),
    most=st.integers(1, 16),
)
def test_parts(gaps: list[int], keys: set[int] | None, step: int, most: int) -> None:
    """They tile the video in whole slices, and little is decoded for two of them."""
    indices = np.cumsum(gaps).tolist()
    known = None if keys is None else sorted({0, *keys})
    parts = segments(indices, known, step, most)
    assert [at for part in parts for at in range(*part)] == [*range(len(indices))]
    assert len(parts) <= most
    assert all(end > start for start, end in parts)
    for start, _ in parts[1:]:
        assert start % step == 0
        if known is not None:
            decoded = [max(key for key in known if key <= indices[start]), indices[start - 1]]
            assert decoded[1] - decoded[0] + 1 <= (indices[-1] - indices[0]) / most / 8


def test_parts_are_alike() -> None:
    assert segments(range(768), None, 32, 2) == [(0, 384), (384, 768)]
    assert segments(range(768), [*range(0, 768, 100)], 8, 2) == [(0, 400), (400, 768)]
    assert segments(range(31), None, 32, 4) == [(0, 31)]


def test_file_with_one_keyframe_is_read_by_one_decoder() -> None:
    """A second one would decode what the first one does."""
    assert segments(range(0, 7680, 10), [0], 32, 4) == [(0, 768)]


# --- Reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 100, 777])
def test_every_frame_arrives_at_its_place(reader: Reader, count: int, multiple: int) -> None:
    indices = [3 * at for at in range(count)]
    source: dict[str, Any] = {}
    assert collect(reader, Copies(source), indices, multiple) == indices
    parts = [part for video in source["opened"] for part in video.parts]
    assert max(parts) <= SLICE_FRAMES
    assert sum(part % multiple > 0 for part in parts) <= 1  # the last one


def test_slices_are_read_side_by_side(reader: Reader) -> None:
    """Three decoders; and one decodes while the last slice of its own is worked on."""
    alone, source = Video(seconds=0.002), {"options": {"seconds": 0.002}}
    indices = [*range(300)]

    def took(video: Video, work: Callable[[int, torch.Tensor], None]) -> float:
        began = time.perf_counter()
        asyncio.run(reader.read(video, indices, work))
        return time.perf_counter() - began

    def slow(start: int, frames: torch.Tensor) -> None:
        time.sleep(0.002 * len(frames))

    assert took(Copies(source), lambda start, frames: None) < 0.5  # 0.6 s of decoding
    assert len(source["opened"]) == 3
    assert took(alone, slow) < 0.9  # 1.2 s of both


@pytest.mark.parametrize("size", [(2160, 3840), (720, 1280), (1080, 1920)])
def test_decoded_frames_have_a_bound(size: tuple[int, int]) -> None:
    """Of all videos together."""
    held = largest = 0
    lock = threading.Lock()
    frame = 3 * size[0] * size[1]

    class Held(Copies):
        def get_frames_at(self, indices: Sequence[int]) -> np.ndarray:
            nonlocal held, largest
            with lock:
                held += frame * len(indices)
                largest = max(largest, held)
            return super().get_frames_at(indices)

    def work(start: int, frames: torch.Tensor) -> None:
        nonlocal held
        time.sleep(0.001)
        with lock:
            held -= frame * len(frames)

    async def read() -> None:
        videos = [Held({"options": {"size": size}}) for _ in range(6)]
        await all_of(reader.read(video, range(100), work, multiple=2) for video in videos)

    reader = Reader(8, 256 * MIB)
    asyncio.run(read())
    reader.shutdown()
    assert held == 0
    assert 2 * frame <= largest <= 256 * MIB


def test_frame_beyond_the_bound_is_read_alone() -> None:
    reader = Reader(4, 64 * MIB)
    video = Copies({"options": {"size": (8192, 8192)}})
    assert collect(reader, video, range(12)) == [*range(12)]
    reader.shutdown()


def test_short_video_does_not_wait_for_a_long_one(reader: Reader) -> None:
    done = []

    async def read(name: str, count: int) -> None:
        video = Copies({"options": {"seconds": 0.0005}})
        await reader.read(video, range(count), lambda start, frames: None)
        done.append(name)

    async def both() -> None:
        long = asyncio.ensure_future(read("long", 2000))
        await asyncio.sleep(0.05)
        await read("short", 40)
        await long

    asyncio.run(both())
    assert done == ["short", "long"]


@pytest.mark.parametrize("fault", ["decoding", "working"])
def test_fault_ends_the_reading(reader: Reader, fault: str) -> None:
    """Nothing of it runs on, and the next video is read."""
    running = 0

    def work(start: int, frames: torch.Tensor) -> None:
        nonlocal running
        running += 1
        time.sleep(0.01)
        running -= 1
        if fault == "working" and start >= 64:
            raise ValueError("no more packets")

    broken = 70 if fault == "decoding" else None
    video = Copies({"options": {"broken_at": broken, "seconds": 0.0005}})

    async def read() -> None:
        with pytest.raises(ValueError, match="no more packets"):
            await reader.read(video, range(3000), work)
        assert not running
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(read())
    assert collect(reader, Copies({}), range(100)) == [*range(100)]
    assert not reader._memory._taken


def test_other_threads_of_pytorch_stay_as_many() -> None:
    was, before = torch.get_num_threads(), 3
    torch.set_num_threads(before)
    seen: list[int] = []
    reader = Reader(2)
    asyncio.run(reader.run(lambda: seen.append(torch.get_num_threads())))
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    reader.shutdown()
    assert seen == [1, before]
    assert torch.get_num_threads() == before
    torch.set_num_threads(was)


# --- Real files ------------------------------------------------------------------------------

TEN_BITS = ("-pix_fmt", "yuv420p10le")
FILES = {
    "h264, three keyframes": ("libx264", ["-g", "40", "-keyint_min", "40"]),
    "h264, one keyframe": ("libx264", ["-g", "9999", "-sc_threshold", "0"]),
    "h264, open groups": ("libx264", ["-x264-params", "open-gop=1:keyint=30:bframes=3"]),
    "hevc": ("libx265", ["-x265-params", "keyint=25:log-level=none"]),
    "hevc, 10 bits": (
        "libx265",
        [*TEN_BITS, "-x265-params", "keyint=25:open-gop=1:log-level=none"],
    ),
    "vp9": ("libvpx-vp9", ["-g", "30"]),
    "av1": ("libaom-av1", ["-cpu-used", "8", "-g", "30"]),
    "av1, 10 bits": ("libaom-av1", [*TEN_BITS, "-cpu-used", "8", "-g", "30"]),
    "variable rate": (
        "libx264",
        ["-vf", "setpts='PTS+random(0)/(8*TB)'", "-vsync", "vfr", "-g", "30"],
    ),
    "rotated": ("libx264", ["-g", "30"]),
}


@pytest.fixture(scope="module", params=FILES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec, options = FILES[request.param]
    path = tmp_path_factory.mktemp("slices") / "clip.mp4"
    source = ["-f", "lavfi", "-i", "testsrc2=size=96x64:rate=20:duration=6"]
    command = ["ffmpeg", "-v", "error", *source, "-c:v", codec, *options, str(path)]
    subprocess.run(command, check=True)
    if request.param == "rotated":  # said beside the pictures, as telephones do
        upright, path = path, path.with_name("rotated.mp4")
        said = ["-c", "copy", "-metadata:s:v:0", "rotate=90"]
        subprocess.run(["ffmpeg", "-v", "error", "-i", str(upright), *said, str(path)], check=True)
    return path


def test_files_are_what_they_are_called(file: Path, request: pytest.FixtureRequest) -> None:
    from torchcodec.decoders import VideoDecoder

    name, decoder = request.node.callspec.params["file"], VideoDecoder(file)
    frames = decoder.get_frames_at([*range(len(decoder))])
    assert decoder.metadata.codec == name.split(",")[0] or name in ("variable rate", "rotated")
    assert ("10" in str(decoder.metadata.pixel_format)) == ("10 bits" in name)
    assert tuple(frames.data.shape[2:]) == ((96, 64) if name == "rotated" else (64, 96))
    apart = frames.pts_seconds.diff()
    assert (float(apart.max() - apart.min()) > 0.05) == (name == "variable rate")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("wish", [None, "keyframes"])
def test_frames_are_those_of_one_decoder(file: Path, threads: int, wish: str | None) -> None:
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(file, dimension_order="NHWC")
    count = 90 if wish is None else 12
    indices = torch.linspace(0, len(decoder) - 1, count).round().long().tolist()
    if wish is not None:
        indices = in_place_of(VideoDecoderWrapper(str(file)), indices)
    expected = torch.stack([decoder[index] for index in indices])
    got = torch.zeros_like(expected)

    def work(start: int, frames: torch.Tensor) -> None:
        got[start : start + len(frames)] = frames

    reader = Reader(threads, 2 * MIB)  # slices of a few frames
    asyncio.run(reader.read(VideoDecoderWrapper(str(file)), indices, work, multiple=2))
    reader.shutdown()
    assert torch.equal(got, expected)


def test_file_with_one_keyframe_gets_threads_of_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the decoders that it cannot use; and others get decoders in place of threads."""
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper
    from torchcodec import decoders

    asked = []

    class Watched(decoders.VideoDecoder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            asked.append(kwargs["num_ffmpeg_threads"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(decoders, "VideoDecoder", Watched)
    for group, count, expected in (("9999", 90, [3]), ("10", 90, []), ("9999", 20, [])):
        path, reader = tmp_path / f"{group}.mp4", Reader(3)
        source = ["-f", "lavfi", "-i", "testsrc2=size=96x64:rate=20:duration=6"]
        options = ["-y", "-c:v", "libx264", "-g", group, "-sc_threshold", "0"]
        subprocess.run(["ffmpeg", "-v", "error", *source, *options, str(path)], check=True)
        asked.clear()
        video = VideoDecoderWrapper(str(path))
        asyncio.run(reader.read(video, range(count), lambda start, frames: None))
        reader.shutdown()
        assert asked == expected
