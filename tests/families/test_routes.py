"""Every way by which a video comes in: the same prompt and pixels in every family, or HTTP 400.

The table in docs/serving.md says which. Sessions and batches are tested on servers.
"""

from __future__ import annotations

import base64
import threading
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

from pevlm_sglang.families.frame_counts import FrameSettings
from pevlm_sglang.families.internvl.sizes import InternVLGeometry
from support.families import internvl_model, internvl_upstream, llava_video_tiny, longvila
from support.processor import Processor, sglang_processor
from support.tiny import make_tiny_model
from support.video import video_data_url, write_video

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
    "`file://`": Path.as_uri,
    "bytes": Path.read_bytes,
    "data URL": video_data_url,
    "base64": lambda clip: base64.b64encode(clip.read_bytes()).decode(),
    "`video_url`": video_data,
    "mapping": lambda clip: {"url": str(clip)},
}
ARRAYS: dict[str, Callable[[Any], Any]] = {
    "pictures": lambda frames: [Image.fromarray(frame) for frame in frames],
    "array": lambda frames: frames,
    "tensor": torch.from_numpy,
    "mapping of pictures": lambda frames: {"url": [Image.fromarray(frame) for frame in frames]},
}


def check_same(output: Any, expected: Any, *, one_file: bool) -> None:
    """Tokens, positions, pixels; and by what they are known."""
    assert output.input_ids == expected.input_ids
    positions = (getattr(one, "mrope_positions", None) for one in (output, expected))
    if (found := next(positions)) is not None:
        assert torch.equal(found, next(positions))
    [item], [theirs] = output.mm_items, expected.mm_items
    assert torch.equal(item.feature, theirs.feature)
    assert item.offsets == theirs.offsets
    assert (item.hash == theirs.hash) is one_file


@pytest.mark.parametrize("route", ENCODED)
def test_encoded(process: Any, clip: Path, route: str) -> None:
    check_same(process([ENCODED[route](clip)]), process([str(clip)]), one_file=True)


def test_http(process: Any, clip: Path, http_url: str) -> None:
    check_same(process([http_url]), process([str(clip)]), one_file=True)


@pytest.mark.parametrize("route", ARRAYS)
def test_arrays(process: Any, family: str, clip: Path, frames: Any, route: str) -> None:
    """The frames that are sampled from the file."""
    sampled = frames if family != "internvl" else frames[INTERNVL_SAMPLES]
    check_same(process([ARRAYS[route](sampled)]), process([str(clip)]), one_file=False)


def test_other_arrays_are_another_video(process: Any, frames: Any) -> None:
    known = {process([video]).mm_items[0].hash for video in (frames, 255 - frames, frames.copy())}
    assert len(known) == 2


def test_too_many_arrays(process: Any, frames: Any) -> None:
    with pytest.raises(ValueError, match="at most 768 frames in a list, the server's max_frames"):
        process([np.tile(frames[:, :2, :2], (97, 1, 1, 1))])


REFUSED: dict[str, Any] = {
    "paths of pictures": ["a.png", "b.png"],
    "a picture alone": Image.new("RGB", (56, 56)),
    "a mapping without a format": {"feature": torch.zeros(1)},
    "nothing": None,
    "a number": 7,
}


@pytest.mark.parametrize("route", REFUSED)
def test_refused(process: Any, route: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)video"):
        process([REFUSED[route]])


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
