"""Every way by which a video comes in: the same prompt and pixels in every family, or HTTP 400.

The table in docs/serving.md says which. Batches are tested on servers.
"""

from __future__ import annotations

import asyncio
import base64
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.families.frame_counts import FrameSettings
from pevlm_sglang.families.internvl.sizes import InternVLGeometry
from pevlm_sglang.media import limits, slices
from support.families import internvl_model, internvl_upstream, llava_video_tiny, longvila
from support.processor import Processor, sglang_processor, without_pinned_memory
from support.tiny import make_tiny_model
from support.video import video_data_url, write_video

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
FRAMES = 8
QWEN = "<|vision_start|><|video_pad|><|vision_end|>"
PROMPTS = {
    "qwen2_vl": f"Look: {QWEN}What?",
    "qwen2_5_vl": f"Look: {QWEN}What?",
    "qwen3_vl": f"Look: {QWEN}What?",
    "internvl": "Look: <video>What?",
    "llava_video": "Look: <video>What?",
    "longvila": f"Look: {longvila.VIDEO}What?",
}
INTERNVL_SAMPLES = InternVLGeometry().indices(FRAMES, 2.0, FrameSettings(num_frames=FRAMES))
SETTINGS = {name: {"num_frames": FRAMES} for name in PROMPTS} | {
    name: {"min_pixels": 3136} for name in PROMPTS if name.startswith("qwen")
}


@contextmanager
def started(family: str, directory: Path) -> Iterator[Processor]:
    """The processor of a tiny model."""
    import transformers
    from sglang.srt.utils.hf_transformers_utils import get_config, get_processor

    video, kind = SETTINGS[family], None
    if family == "internvl":
        model = internvl_model.make_tiny_model(directory)
        with internvl_upstream.processor(model, video=video) as found:
            yield found
        return
    if family.startswith("qwen"):
        from pevlm_sglang.families.qwen_vl.processor import QwenVLProcessor

        kind = QwenVLProcessor
        older = "qwen2_5_vl" if family == "qwen3_vl" else family
        path = make_tiny_model(directory, architecture=older, num_layers=1, vision_depth=1)
        config = transformers.AutoConfig.from_pretrained(path)
        processor = get_processor(str(path))
        if family == "qwen3_vl":
            ids = ("image_token_id", "video_token_id", "vision_start_token_id")
            ids = {name: getattr(config, name) for name in (*ids, "vision_end_token_id")}
            architectures = ["Qwen3VLForConditionalGeneration"]
            config = transformers.Qwen3VLConfig(architectures=architectures, **ids)
            processor = transformers.Qwen3VLProcessor(
                transformers.Qwen2VLImageProcessor(patch_size=16),
                processor.tokenizer,
                transformers.Qwen3VLVideoProcessor(),
            )
    elif family == "llava_video":
        from pevlm_sglang.families.llava_video.checkpoint import load_processor
        from pevlm_sglang.families.llava_video.processor import LlavaVideoProcessor

        kind = LlavaVideoProcessor
        path = llava_video_tiny.make_tiny_model(directory / "model")
        config = transformers.AutoConfig.from_pretrained(path)
        processor = load_processor(get_processor, str(path), model_name=str(path))
    else:
        from pevlm_sglang.families.longvila import checkpoint
        from pevlm_sglang.families.longvila.processor import LongVilaProcessor

        kind = LongVilaProcessor
        checkpoint.register()
        path = longvila.make_tiny_model(directory / "longvila")
        config = get_config(str(path), trust_remote_code=False)
        processor = get_processor(str(path), model_name=str(path))
    with sglang_processor(kind, config, processor, video=video) as found:
        yield found


@pytest.fixture(scope="module", params=PROMPTS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def process(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with started(family, tmp_path_factory.mktemp(family)) as found:
        yield partial(found, PROMPTS[family])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many frames as are sampled, two a second."""
    path = tmp_path_factory.mktemp("clips") / "a clip.mp4"
    return write_video(path, seconds=FRAMES / 2, fps=2, size=(112, 84), seed=1)


@pytest.fixture(scope="module")
def frames(clip: Path) -> np.ndarray[Any, Any]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(clip), dimension_order="NHWC")
    assert len(decoder) == FRAMES
    found: np.ndarray[Any, Any] = decoder.get_frames_at(list(range(FRAMES))).data.numpy()
    return found


@pytest.fixture(scope="module")
def http_url(clip: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(clip.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a%20clip.mp4"
        server.shutdown()


def video_data(clip: Path) -> Any:
    """What SGLang makes of a chat's part."""
    from sglang.srt.utils import VideoData

    return VideoData(url=str(clip), preprocess_kwargs={})


ENCODED: dict[str, Callable[[Path], Any]] = {
    "path": str,
    "`file://` URL": Path.as_uri,
    "bytes": Path.read_bytes,
    "`data:` URL": video_data_url,
    "base64": lambda clip: base64.b64encode(clip.read_bytes()).decode(),
    "`video_url` part": video_data,
    "mapping of `url`": lambda clip: {"url": str(clip)},
}
ARRAYS: dict[str, Callable[[Any], Any]] = {
    "list of pictures": lambda frames: [Image.fromarray(frame) for frame in frames],
    "list of pictures, arrays": lambda frames: [*frames[:2], *map(torch.from_numpy, frames[2:])],
    "array or tensor of frames": lambda frames: frames,
    "array or tensor of frames, the latter": torch.from_numpy,
    "what qwen-vl-utils returns": lambda frames: torch.from_numpy(frames).movedim(3, 1).float(),
    "mapping of frames": lambda frames: {"url": [Image.fromarray(frame) for frame in frames]},
    "mapping of frames, their rate": lambda frames: {"url": frames, "fps": 2},
}


def check_same(output: Any, expected: Any) -> None:
    """Tokens, positions, pixels; and by what they are known."""
    assert output.input_ids == expected.input_ids
    positions = (getattr(one, "mrope_positions", None) for one in (output, expected))
    if (found := next(positions)) is not None:
        assert torch.equal(found, next(positions))
    [item], [theirs] = output.mm_items, expected.mm_items
    assert torch.equal(item.feature, theirs.feature)
    assert item.offsets == theirs.offsets
    assert item.hash == theirs.hash


@pytest.mark.parametrize("route", ENCODED)
def test_encoded(process: Any, clip: Path, route: str) -> None:
    check_same(process([ENCODED[route](clip)]), process([str(clip)]))


def test_http(process: Any, clip: Path, http_url: str) -> None:
    check_same(process([http_url]), process([str(clip)]))


def test_more_pixels_than_a_request_may_have(
    process: Any, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before any of them is decoded."""

    def decoding(*_: Any) -> None:
        raise AssertionError("decoded")

    process.func.sglang.cache.clear()
    monkeypatch.setattr(slices, "decoded", decoding)
    exactly = FRAMES * 112 * 84
    monkeypatch.setattr(limits, "limits", limits.Limits(request_pixels=exactly))
    with pytest.raises(AssertionError, match="decoded"):
        process([str(clip)])
    monkeypatch.setattr(limits, "limits", limits.Limits(request_pixels=exactly - 1))
    with pytest.raises(ValueError, match=rf"at most {exactly - 1} pixels .*, got {exactly};"):
        process([str(clip)])


@pytest.mark.parametrize("route", ARRAYS)
def test_arrays(process: Any, family: str, clip: Path, frames: Any, route: str) -> None:
    """The frames that are sampled from the file."""
    sampled = frames if family != "internvl" else frames[INTERNVL_SAMPLES]
    if family == "internvl" and "rate" in route:  # it has none
        with pytest.raises(ValueError, match="fps: expected one of max_frames"):
            process([ARRAYS[route](sampled)])
        return
    check_same(process([ARRAYS[route](sampled)]), process([str(clip)]))


def test_other_arrays_are_another_video(process: Any, frames: Any) -> None:
    known = {process([video]).mm_items[0].hash for video in (frames, 255 - frames, frames.copy())}
    assert len(known) == 2


def known(process: Any, *videos: Any) -> int:
    """How many videos these are to SGLang's caches."""
    return len({process([video]).mm_items[0].hash for video in videos})


def test_another_file_is_another_video(process: Any, clip: Path, tmp_path: Path) -> None:
    other = write_video(tmp_path / "other.mp4", seconds=FRAMES / 2, fps=2, size=(112, 84), seed=2)
    assert known(process, str(clip), str(other)) == 2


def test_other_frames_are_another_video(process: Any, family: str, tmp_path: Path) -> None:
    long = str(write_video(tmp_path / "long.mp4", seconds=FRAMES, fps=2, size=(112, 84), seed=1))
    fixed = family in ("llava_video", "longvila")  # as many frames, by another rule
    wish = {"fps": 1} if fixed else {"max_frames": FRAMES - 2}
    other = {"url": long, **wish}
    if fixed:
        shapes = {tuple(process([video]).mm_items[0].feature.shape) for video in (long, other)}
        assert len(shapes) == 1
    assert known(process, long, other) == 2


def test_what_is_made_otherwise_is_another_video(
    process: Any, family: str, clip: Path, frames: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numeric type, and what else a family's settings change."""
    processor = process.func.sglang
    wide = processor._dtype == torch.float32
    changes: dict[str, Any] = {"_dtype": torch.bfloat16 if wide else torch.float32}
    if family == "qwen2_5_vl":  # the rate is in the positions; in Qwen3-VL's text, where it is
        assert known(process, *({"url": frames, "fps": rate} for rate in (2, 4))) == 2
    if family == "internvl":
        changes["VIDEO_MAX_NUM"] = 6
    found = {process([str(clip)]).mm_items[0].hash}
    for name, value in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(processor, name, value)
            found.add(process([str(clip)]).mm_items[0].hash)
    assert len(found) == 1 + len(changes)


@pytest.fixture
def old_copy(process: Any, clip: Path, tmp_path: Path) -> Path:
    """Of the clip, old enough to be known by what the file system says, on an empty cache."""
    path = tmp_path / "old.mp4"
    path.write_bytes(clip.read_bytes())
    time.sleep(0.12)
    process.func.sglang.clear_preprocess_cache()
    return path


@pytest.mark.parametrize("known", [False, True])
def test_a_file_that_changes_while_it_is_read(
    process: Any, old_copy: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if known:
        process([str(old_copy)])
        process.func.sglang.cache.clear()  # known, and not prepared
    reader = process.func.sglang.reader
    upstream = reader.read

    async def read(*args: Any, **kwargs: Any) -> None:
        await upstream(*args, **kwargs)
        old_copy.write_bytes(b"another")

    monkeypatch.setattr(reader, "read", read)
    with pytest.raises(ValueError, match="expected a file that stays as it is"):
        process([str(old_copy)])


def sampled(process: Any, family: str, total: int, fps: float) -> list[int]:
    """Which frames of a file, without a wish."""
    processor = process.func.sglang
    if family.startswith("qwen"):
        count = processor.geometry.sampled_frames(total, fps, processor.settings)
        return [round(place) for place in np.linspace(0, total - 1, count)]
    found: list[int] = processor.geometry.indices(total, fps, processor.settings)
    return found


def test_keyframes(process: Any, family: str, tmp_path: Path) -> None:
    """Those near the sampled frames; tokens and positions stay, but for Qwen3-VL's timestamps."""
    from sglang.srt.utils import VideoData
    from torchcodec.decoders import VideoDecoder

    path = tmp_path / "keyed.mp4"
    write_video(path, seconds=4, fps=10, size=(112, 84), seed=1, group=7)
    every = VideoDecoder(str(path), dimension_order="NHWC")[:].numpy()
    indices = sampled(process, family, 40, 10.0)
    half = (indices[-1] - indices[0]) / (len(indices) - 1) / 2
    expected = []
    for index in indices:
        key = min((0, 7, 14, 21, 28, 35), key=lambda key: abs(key - index))
        expected.append(key if abs(key - index) <= half and key not in expected else index)
    assert 3 < len({*expected} & {0, 7, 14, 21, 28, 35}) < len(expected)
    assert expected != indices

    wish = {"frames": "keyframes"}
    output, plain = process([{"url": str(path), **wish}]), process([str(path)])
    assert torch.equal(output.mm_items[0].feature, process([every[expected]]).mm_items[0].feature)
    assert output.mm_items[0].hash != plain.mm_items[0].hash
    chat = process([VideoData(str(path), preprocess_kwargs=wish)])
    check_same(chat, output)
    if family == "qwen3_vl":
        times = [sum(expected[at : at + 2]) / 2 / 10 for at in range(0, len(expected), 2)]
        text = process.func.sglang._tokenizer.decode(output.input_ids)
        assert re.findall(r"<([\d.]+) seconds>", text) == [f"{time:.1f}" for time in times]
        return
    assert output.input_ids == plain.input_ids
    if family.startswith("qwen"):
        assert torch.equal(output.mrope_positions, plain.mrope_positions)


def test_wish_for_frames_that_cannot_be_met(process: Any, clip: Path, frames: Any) -> None:
    with pytest.raises(ValueError, match="frames: expected an encoded video, got frames"):
        process([{"url": frames, "frames": "keyframes"}])
    for word in ("keyframe", "all", 3, True):
        with pytest.raises(ValueError, match="frames: expected 'keyframes', got"):
            process([{"url": str(clip), "frames": word}])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often frames were decoded, and files opened."""
    seen = {"decoded": 0, "opened": 0}
    decoded, opened = slices.decoded, VideoDecoderWrapper.__init__

    def watched(*args: Any) -> Any:
        seen["decoded"] += 1
        return decoded(*args)

    def open_it(*args: Any, **kwargs: Any) -> None:
        seen["opened"] += 1
        opened(*args, **kwargs)

    monkeypatch.setattr(slices, "decoded", watched)
    monkeypatch.setattr(VideoDecoderWrapper, "__init__", open_it)
    return seen


def test_what_is_prepared_stays_so(process: Any, old_copy: Path, counted: dict[str, int]) -> None:
    """For its tenant, until it is flushed; and a known file is not opened."""
    first = process([str(old_copy)])
    once = dict(counted)
    assert min(once.values()) > 0
    check_same(process([str(old_copy)]), first)
    assert counted == once
    process([str(old_copy)], cache_salt="another")
    assert counted["decoded"] == 2 * once["decoded"]
    process([str(old_copy)], extra_key="another")
    assert counted["decoded"] == 3 * once["decoded"]
    process.func.sglang.clear_preprocess_cache()
    check_same(process([str(old_copy)]), first)
    assert counted["decoded"] == 4 * once["decoded"]


def test_the_same_file_by_another_route(
    process: Any, old_copy: Path, counted: dict[str, int]
) -> None:
    """Is opened to be known by its content, and decoded no more."""
    first = process([str(old_copy)])
    once = dict(counted)
    check_same(process([old_copy.read_bytes()]), first)
    assert counted == {"decoded": once["decoded"], "opened": once["opened"] + 1}


def test_who_asks_for_a_download_and_hangs_up(
    process: Any, clip: Path, http_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request that waits for the same video gets it: the first one's file stays for it."""
    reader = process.func.sglang.reader
    process.func.sglang.cache.clear()
    expected = process([str(clip)])
    process.func.sglang.cache.clear()
    upstream = reader.read
    reads: list[int] = []

    async def two() -> Any:
        go = asyncio.Event()

        async def read(*args: Any, **kwargs: Any) -> None:
            reads.append(1)
            await go.wait()
            await upstream(*args, **kwargs)

        monkeypatch.setattr(reader, "read", read)
        asking = [
            asyncio.ensure_future(process.func.process(*process.args, [http_url])) for _ in range(2)
        ]
        while not reads:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # both have downloaded by then
        asking[0].cancel()
        await asyncio.wait(asking[:1])
        go.set()
        return await asking[1]

    with without_pinned_memory():
        check_same(asyncio.run(two()), expected)
    assert len(reads) == 1


def test_a_known_file_that_changes_before_it_is_read(
    process: Any, old_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process([str(old_copy)])
    processor = process.func.sglang
    processor.cache.clear()  # known, and not prepared
    content, opened = old_copy.read_bytes(), processor._opened

    def replaced(video: Any) -> Any:
        old_copy.write_bytes(content + b"another")
        return opened(video)

    monkeypatch.setattr(processor, "_opened", replaced)
    with pytest.raises(ValueError, match="expected a file that stays as it is"):
        process([str(old_copy)])


def test_too_many_arrays(process: Any, frames: Any) -> None:
    with pytest.raises(ValueError, match="at most 768 frames in a list, the server's max_frames"):
        process([np.tile(frames[:, :2, :2], (97, 1, 1, 1))])


REFUSED: dict[str, Any] = {
    "list of paths": ["a.png", "b.png"],
    "a picture alone": Image.new("RGB", (56, 56)),
    "a mapping without a format": {"feature": torch.zeros(1)},
    "nothing": None,
    "a number": 7,
}


@pytest.mark.parametrize("route", REFUSED)
def test_refused(process: Any, route: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)video"):
        process([REFUSED[route]])


def test_sglang_s_names_for_other_models(process: Any, family: str, clip: Path) -> None:
    """In a ``video_url`` part: read by whoever has tiles, and by nobody."""
    from sglang.srt.utils import VideoData

    def ask(**said: int) -> Any:
        return process([VideoData(url=str(clip), preprocess_kwargs=said)])

    with pytest.raises(ValueError, match="video max_image_tokens: expected one of fps, max_frames"):
        ask(max_image_tokens=64)
    if family == "internvl":
        assert ask(max_dynamic_patch=1).input_ids == process([str(clip)]).input_ids
    else:
        with pytest.raises(ValueError, match="video max_dynamic_patch: expected one of fps"):
            ask(max_dynamic_patch=1)


PROCESSED = ("processor_output", "precomputed_embedding")


@pytest.mark.parametrize("format", PROCESSED)
def test_processed_already(process: Any, family: str, format: str) -> None:
    """Taken by no family: sampling and positions would be whatever the client made of them."""
    video = {
        "format": format,
        "feature": torch.zeros(4, 8),
        "video_grid_thw": torch.tensor([[1, 2, 2]]),
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match="processed already"):
        process([video])


def test_the_documented_routes_are_these() -> None:
    section = DOCUMENT.read_text().split("## How a video comes in")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    documented = {route.removeprefix("| "): outcome for route, outcome, *_ in rows}
    refused = {"list of paths", *(f"`{format}`" for format in PROCESSED)}
    taken = {name.split(", ")[0] for name in (*ENCODED, *ARRAYS)} - {"path", "`file://` URL"}
    taken |= {"path, `file://` URL", "`http://` or `https://` URL"}
    assert {route for route, outcome in documented.items() if outcome[:8] == "HTTP 400"} == refused
    assert set(documented) - refused == taken
