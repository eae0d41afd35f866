"""Every way in which a video comes in, for every family: the same video, or refused.

``docs/serving.md`` has the table of the routes; those of it that need a server or a client are
tested where it says.
"""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.families.processors import PROCESSORS
from support.processor import Processor
from support.video import video_data_url, write_video

pytest.importorskip("sglang")

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
FRAMES = 6  # of the clip; 2 a second, as which frames without a rate count
FEATURES = {"format": "processor_output", "pixel_values_videos": torch.zeros(4, 4)}
EMBEDDING = {"format": "precomputed_embedding", "feature": torch.zeros(4, 4)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=PROCESSORS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def process(family: str, models: Path) -> Iterator[Callable[..., Any]]:
    """The processor's output for one video, on a server that takes all frames of the clip."""
    record = PROCESSORS[family]
    with record.build(models, record.settings) as processor:
        yield partial(_process, processor, record.prompt)


def _process(processor: Processor, prompt: str, *videos: Any) -> Any:
    return processor(prompt * len(videos), videos)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "a clip.mp4"
    return write_video(path, seconds=FRAMES / 2, fps=2, size=(140, 112))


@pytest.fixture(scope="module")
def frames(clip: Path) -> np.ndarray:
    """``[frames, height, width, 3]`` uint8"""
    from torchcodec.decoders import VideoDecoder

    every: np.ndarray = VideoDecoder(str(clip), dimension_order="NHWC")[:].numpy()
    assert len(every) == FRAMES
    return every


@pytest.fixture(scope="module")
def web(clip: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(clip.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a%20clip.mp4"
        server.shutdown()


def _video_data(path: Path) -> Any:
    from sglang.srt.utils.common import VideoData

    return VideoData(url=str(path), preprocess_kwargs=None)


# By the table's names: each is the clip, or its frames.
FILES: dict[str, Callable[[Path, str], Any]] = {
    "path": lambda path, url: str(path),
    "`file://` URL": lambda path, url: path.as_uri(),
    "`http://`, `https://` URL": lambda path, url: url,
    "`data:` URL": lambda path, url: video_data_url(path),
    "base64": lambda path, url: base64.b64encode(path.read_bytes()).decode(),
    "bytes": lambda path, url: path.read_bytes(),
    "mapping with `url`": lambda path, url: {"url": str(path)},
    "`video_url` part": lambda path, url: _video_data(path),
}
ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "list of PIL pictures": lambda array: [Image.fromarray(frame) for frame in array],
    "list of arrays or tensors": lambda array: [
        frame if at % 2 else torch.from_numpy(frame) for at, frame in enumerate(array)
    ],
    "numpy array": lambda array: array,
    "tensor": lambda array: torch.from_numpy(array).permute(0, 3, 1, 2),
    "what qwen-vl-utils returns": lambda array: torch.from_numpy(array).permute(0, 3, 1, 2).float(),
    "mapping of frames with `sample_fps`": lambda array: {"url": array, "sample_fps": 2},
}
REFUSED: dict[str, tuple[Any, str]] = {
    "`processor_output`": (FEATURES, "processed elsewhere"),
    "`precomputed_embedding`": (EMBEDDING, "processed elsewhere"),
    "list of paths or URLs": (["/a.png", "/b.png"], "expected pictures in a list, got /a.png"),
}
ELSEWHERE = {
    "neighbouring images": "tests/server/test_video_in.py",
    "turns of a session": "tests/server/test_state.py",
    "batch of prompts": "tests/server/test_video_in.py",
}


def equal(found: Any, expected: Any, *, same_file: bool) -> None:
    assert [*found.input_ids] == [*expected.input_ids]
    for one, other in zip(found.mm_items, expected.mm_items, strict=True):
        assert one.offsets == other.offsets
        assert torch.equal(one.feature, other.feature)
        assert (one.hash == other.hash) == same_file
    for name in ("mrope_positions", "mrope_position_delta"):
        one, other = (getattr(output, name, None) for output in (found, expected))
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other)


@pytest.mark.parametrize("route", FILES)
def test_a_file(process: Callable[..., Any], route: str, clip: Path, web: str) -> None:
    equal(process(FILES[route](clip, web)), process(str(clip)), same_file=True)


@pytest.mark.parametrize("route", ARRAYS)
def test_frames(
    process: Callable[..., Any], family: str, route: str, clip: Path, frames: np.ndarray
) -> None:
    """Those that are sampled of a file, 2 a second, are that file."""
    frames = frames[list(PROCESSORS[family].sampled)]
    found = process(ARRAYS[route](frames))
    equal(found, process(str(clip)), same_file=False)
    assert found.mm_items[0].hash == process(frames).mm_items[0].hash


@pytest.mark.parametrize("route", REFUSED)
def test_refused(process: Callable[..., Any], route: str) -> None:
    video, message = REFUSED[route]
    with pytest.raises(ValueError, match=re.escape(message)):
        process(video)


def test_beside_a_file(process: Callable[..., Any], clip: Path, frames: np.ndarray) -> None:
    """Frames and a file in one prompt are each what they are alone."""
    both, alone = process(frames[:4], str(clip)), process(str(clip))
    pixels = torch.cat([item.feature for item in both.mm_items])
    assert torch.equal(pixels[-len(alone.mm_items[0].feature) :], alone.mm_items[0].feature)


def test_each_frame_counts(process: Callable[..., Any], frames: np.ndarray) -> None:
    """In its features, and in what the prefix cache knows the video by."""
    other = frames.copy()
    other[-1, :, :, 0] += 1
    first, second = process(frames), process(other)
    assert first.mm_items[0].hash != second.mm_items[0].hash
    assert not torch.equal(first.mm_items[0].feature, second.mm_items[0].feature)


@pytest.mark.parametrize("count", [1, 3])
def test_all_of_any_number(
    process: Callable[..., Any], family: str, frames: np.ndarray, count: int
) -> None:
    """Qwen's odd last frame is there twice, as in qwen-vl-utils."""
    found = process(frames[:count])
    repeated = np.concatenate([frames[:count], frames[count - 1 : count]])
    expected = process(repeated if family.startswith("qwen") else frames[:count])
    assert [*found.input_ids] == [*expected.input_ids]
    assert torch.equal(found.mm_items[0].feature, expected.mm_items[0].feature)
    if not family.startswith("qwen"):
        assert len(found.mm_items[0].feature) == count


def _floats(frames: np.ndarray) -> Any:
    return torch.from_numpy(frames).float() / 255


BAD: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "empty list": (lambda frames: [], "at least one frame"),
    "empty array": (lambda frames: frames[:0], "at least one frame"),
    "one frame": (lambda frames: frames[0], "belong in one list"),
    "no picture": (lambda frames: [None], "expected pictures in a list"),
    "flat pictures": (lambda frames: [frames[0, :, :, 0]], "expected pictures in a list"),
    "two sizes": (lambda frames: [frames[0], frames[1][:50]], "pictures of one size"),
    "four channels": (lambda frames: frames.repeat(2, -1)[..., :4], "[height, width, 3]"),
    "ambiguous channels": (lambda frames: frames[:, :3], "[height, width, 3]"),
    "from 0 to 1": (_floats, "whole numbers from 0 to 255"),
    "bfloat16": (lambda frames: _floats(frames).bfloat16(), "whole numbers from 0 to 255"),
    "too large": (lambda frames: frames.astype(np.int32) + 9, "whole numbers from 0 to 255"),
    "not a number": (lambda frames: frames * np.nan, "whole numbers from 0 to 255"),
    "objects": (lambda frames: frames.astype(object), "whole numbers from 0 to 255"),
    "transparent": (lambda frames: [Image.new("RGBA", (8, 8))], "without transparency"),
    "fps": (lambda frames: {"url": frames, "fps": 1}, "fps: expected a video file, got frames"),
    "max_frames": (
        lambda frames: {"url": frames, "max_frames": 4},
        "max_frames: expected a video file, got frames",
    ),
    "no rate": (lambda frames: {"url": frames, "sample_fps": 0}, "sample_fps: expected a number"),
    "true": (lambda frames: {"url": frames, "sample_fps": True}, "sample_fps: expected a number"),
    "rate of a file": (lambda frames: {"url": "/a.mp4", "sample_fps": 2}, "expected frames"),
    "too many": (lambda frames: [frames[0]] * 769, "expected at most 768, the server's limit"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_frames(process: Callable[..., Any], frames: np.ndarray, kind: str) -> None:
    make, message = BAD[kind]
    with pytest.raises(ValueError, match=re.escape(message)):
        process(make(frames))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_rate_of_frames(
    process: Callable[..., Any], frames: np.ndarray, tmp_path: Path, family: str
) -> None:
    """Positions, or the timestamps in the text, are those of a file with this rate."""
    del family
    from torchcodec.encoders import VideoEncoder

    path = tmp_path / "four.mp4"
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    VideoEncoder(pixels, frame_rate=1).to_file(path, codec="libx264", crf=0)
    slow, fast = process({"url": frames, "sample_fps": 1}), process(frames)
    of_file = process({"url": str(path), "fps": 1})
    assert [*slow.input_ids] == [*of_file.input_ids]
    assert torch.equal(slow.mrope_positions, of_file.mrope_positions)
    same = [*slow.input_ids] == [*fast.input_ids]
    assert not (same and torch.equal(slow.mrope_positions, fast.mrope_positions))
    assert slow.mm_items[0].hash != fast.mm_items[0].hash


def test_the_documented_routes_are_these() -> None:
    section = DOCUMENT.read_text().split("## How a video comes in")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    documented = {row[0].removeprefix("| "): row[1] for row in rows[1:]}
    assert set(documented) == {*FILES, *ARRAYS, *REFUSED, *ELSEWHERE}
    for route, outcome in documented.items():
        assert outcome.startswith("400") == (route in REFUSED), route
