"""The processor's videos are qwen-vl-utils': pixels, grids, tokens, positions, and settings."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pevlm_sglang.families.qwen_vl.sizes import PUBLISHED
from pevlm_sglang.media.pixel_device import PixelDevice
from pevlm_sglang.settings.config import VIDEO_RESIZES
from support.clips import whole
from support.families.qwen_vl import mrope_positions, reference_inputs, reference_video
from support.processor import Processor, in_the_scheduler, longest_pause, sglang_processor
from support.tiny import make_tiny_model
from support.video import write_video

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PROMPT = f"<|im_start|>user\nLook: {VIDEO}What happens?<|im_end|>\n<|im_start|>assistant\n"
PATCH = {name: geometry.patch_size for name, geometry in PUBLISHED.items()}
MODELS = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
FEW = {"min_pixels": 3136}  # keeps clips small

Start = Callable[..., Processor]


@dataclass(frozen=True)
class Model:
    """What a processor is built from."""

    config: Any
    processor: Any


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Tiny Qwen2-VL and Qwen2.5-VL, and for Qwen3-VL their tokenizer with its processor."""
    import transformers
    from sglang.srt.utils.hf_transformers.processor import get_processor

    directory = tmp_path_factory.mktemp("models")
    found = {}
    for name in ("qwen2_5_vl", "qwen2_vl"):
        path = make_tiny_model(directory / name, architecture=name, num_layers=1, vision_depth=1)
        config = transformers.AutoConfig.from_pretrained(path)
        found[name] = Model(config, get_processor(str(path)))
    older = found["qwen2_5_vl"]
    ids = {
        name: getattr(older.config, name)
        for name in (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
    }
    found["qwen3_vl"] = Model(
        transformers.Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"], **ids),
        transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(patch_size=16),
            older.processor.tokenizer,
            transformers.Qwen3VLVideoProcessor(),
        ),
    )
    return found


@pytest.fixture
def start(models: dict[str, Model]) -> Iterator[Start]:
    """Build a processor; ``upstream=True`` is SGLang's own one."""
    from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

    from pevlm_sglang.families.qwen_vl.processor import QwenVLProcessor

    with ExitStack() as stack:

        def build(name: str, *, upstream: bool = False, **options: Any) -> Processor:
            kind = QwenVLImageProcessor if upstream else QwenVLProcessor
            model = models[name]
            return stack.enter_context(
                sglang_processor(kind, model.config, model.processor, **options)
            )

        yield build


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    directory = tmp_path_factory.mktemp("clips")

    def write(frames: int, size: tuple[int, int], fps: float = 4.0, seed: int = 0) -> Path:
        path = directory / f"{frames}-{size[0]}x{size[1]}-{fps}-{seed}.mp4"
        if path.exists():
            return path
        return write_video(path, seconds=frames / fps, fps=fps, size=size, seed=seed)

    return write


def reference(
    model: Model,
    name: str,
    videos: Sequence[tuple[Path | Sequence[Any], Mapping[str, Any]]],
    prompt: str,
    resize: str = "uint8",
) -> Any:
    clips = [
        reference_video(path, settings, image_patch_size=PATCH[name], resize=resize)
        for path, settings in videos
    ]
    return reference_inputs(model.processor, prompt, clips)


def pixels(output: Any) -> torch.Tensor:
    return torch.cat([item.feature for item in output.mm_items])


def grids(output: Any) -> list[list[int]]:
    return [video.grid for video in whole(output.mm_items)]


def assert_same(output: Any, expected: Any) -> None:
    """Tokens, grids and pixels, to the bit."""
    assert output.input_ids == expected["input_ids"][0].tolist()
    assert grids(output) == expected["video_grid_thw"].tolist()
    assert torch.equal(pixels(output), expected["pixel_values_videos"])


# --- Sampling and resizing -------------------------------------------------------------------

CLIPS = [
    # frames, size, frames a second of the file, settings
    (2, (112, 84), 4.0, {}),
    (3, (84, 112), 4.0, {}),
    (5, (30, 28), 4.0, {}),
    (37, (202, 114), 7.5, {}),
    (61, (114, 202), 29.97, {"fps": 9}),
    (90, (640, 36), 25.0, {"fps": 3.3}),
    (300, (96, 64), 30.0, {"fps": 24}),
    (300, (64, 96), 30.0, {"max_frames": 7, "min_frames": 5}),
    (47, (66, 50), 10.0, {"nframes": 11}),
    (40, (322, 182), 4.0, {"max_pixels": 20_000}),
    (40, (322, 182), 4.0, {"max_pixels": 40_000, "total_pixels": 100_000}),
    (12, (322, 182), 4.0, {"resized_height": 70, "resized_width": 200}),
    (8, (1300, 724), 4.0, {"min_pixels": 128 * 32 * 32}),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("resize", VIDEO_RESIZES)
@pytest.mark.parametrize("case", CLIPS, ids=str)
def test_video_is_the_references(
    models: dict[str, Model],
    start: Start,
    clip: Callable[..., Path],
    name: str,
    resize: str,
    case: Any,
) -> None:
    frames, size, fps, settings = case
    video, settings = clip(frames, size, fps), {**FEW, **settings}
    output = start(name, video=settings, pevlm={"video_resize": resize})(PROMPT, [str(video)])
    expected = reference(models[name], name, [(video, settings)], PROMPT, resize)
    assert_same(output, expected)
    if name == "qwen3_vl":
        return  # its steps are videos of their own to M-RoPE
    config, ids = models[name].config, expected["input_ids"][0]
    assert torch.equal(output.mrope_positions, mrope_positions(config, expected, ids)[:, 0])


@pytest.mark.parametrize("name", MODELS)
def test_default_settings(
    models: dict[str, Model], start: Start, clip: Callable[..., Path], name: str
) -> None:
    """At least 128 tokens a frame, of 28 or 32 pixels."""
    video = clip(20, (112, 84))
    output = start(name)(PROMPT, [str(video)])
    assert_same(output, reference(models[name], name, [(video, {})], PROMPT))


def test_environment_bounds_the_pixels(
    models: dict[str, Model],
    start: Start,
    clip: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    video = clip(40, (322, 182))
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "1e5")
    output = start("qwen2_5_vl", video=FEW)(PROMPT, [str(video)])
    settings = {**FEW, "total_pixels": 100_000}
    assert_same(output, reference(models["qwen2_5_vl"], "qwen2_5_vl", [(video, settings)], PROMPT))
    settings = {**FEW, "total_pixels": 70_000}  # the flag says more than the environment
    output = start("qwen2_5_vl", video=settings)(PROMPT, [str(video)])
    assert_same(output, reference(models["qwen2_5_vl"], "qwen2_5_vl", [(video, settings)], PROMPT))


def test_metadata_of_a_video(clip: Callable[..., Path]) -> None:
    """As transformers' ``VideoMetadata`` has it: the duration in seconds, of the whole file."""
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    from pevlm_sglang.families.qwen_vl.video import sample

    geometry = PUBLISHED["qwen2_5_vl"]
    video = VideoDecoderWrapper(str(clip(37, (202, 114), 7.5)))
    assert sample(video, geometry, geometry.settings({"nframes": 4})).metadata == {
        "fps": 7.5,
        "duration": pytest.approx(37 / 7.5),
        "total_num_frames": 37,
        "frames_indices": [0, 12, 24, 36],
        "video_backend": "torchcodec",
    }


@pytest.mark.parametrize("name", MODELS)
def test_upstream_differs(
    models: dict[str, Model], start: Start, clip: Callable[..., Path], name: str
) -> None:
    """What is corrected is there to be corrected, on these clips."""
    resized, not_resized = clip(37, (202, 114), 7.5), clip(37, (224, 224), 7.5)
    processor = start(name, video=FEW, upstream=True)
    for video in (resized, not_resized):
        expected = reference(models[name], name, [(video, FEW)], PROMPT)["pixel_values_videos"]
        got = pixels(processor(PROMPT, [str(video)]))
        assert got.shape != expected.shape or (got - expected).abs().max() > 0.1


# --- Loops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_scheduler_hashes_nothing(start: Start, clip: Callable[..., Path], name: str) -> None:
    """Nor does anything else that has read the same file under the same settings."""
    videos = [str(clip(12, (112, 84), seed=seed)) for seed in (0, 1)]
    prompt = PROMPT.replace(VIDEO, f"{VIDEO} and {VIDEO}")
    processor = start(name, video=FEW)

    def hashes(*paths: str) -> list[int]:
        inputs = in_the_scheduler(processor(prompt, paths))
        return [item.hash for item in inputs.mm_items]

    there = hashes(*videos)
    assert there == hashes(*videos)
    assert not {*there} & {*hashes(videos[1], videos[1])} - {*there[1:]}
    copy = Path(videos[0]).with_name("copy.mp4")
    copy.write_bytes(Path(videos[0]).read_bytes())
    assert there == hashes(str(copy), videos[1])


def test_images_are_hashed_in_the_launcher(start: Start) -> None:
    picture = Image.fromarray(np.full((56, 56, 3), 40, np.uint8))
    prompt = PROMPT.replace("video", "image")
    assert in_the_scheduler(start("qwen2_5_vl")(prompt, images=[picture])).mm_items[0].hash


def test_transformers_processor_runs_in_a_thread(
    start: Start, clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one processor SGLang calls it on the event loop; on a GPU it has one."""
    processor = start("qwen2_5_vl", video=FEW)
    assert processor.sglang.mm_processor_executor is None
    where, call = [], processor.sglang._call_processor

    def watched(*args: Any) -> Any:
        where.append(threading.current_thread())
        return call(*args)

    monkeypatch.setattr(processor.sglang, "_call_processor", watched)
    processor(PROMPT, [str(clip(12, (112, 84)))])
    assert len(where) == 1
    assert where[0] is not threading.main_thread()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_event_loop_goes_on(start: Start, clip: Callable[..., Path], name: str) -> None:
    """While eight videos come in at once."""
    video = str(clip(120, (644, 336), 30.0))
    processor = start(name, video={"nframes": 120})

    async def eight() -> float:
        videos = [processor.process(PROMPT, [video]) for _ in range(8)]
        return await longest_pause(asyncio.gather(*videos))

    began = time.perf_counter()
    pause = asyncio.run(eight())
    assert pause < max(0.15, (time.perf_counter() - began) / 20)  # what one video takes: an eighth


# --- On a device -----------------------------------------------------------------------------


def test_processor_takes_the_device_that_was_chosen(
    models: dict[str, Model], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results stay where SGLang's transport takes features from there, and none is kept for the
    next question."""
    from sglang.srt.multimodal.transport.cuda_ipc import MM_FEATURE_CACHE_SIZE

    from pevlm_sglang.families.qwen_vl.processor import QwenVLProcessor
    from pevlm_sglang.media.pixel_device import CHOSEN

    assert start("qwen2_5_vl").sglang.pixel_device is None
    cases = (("cpu", 0, 0), ("cuda_ipc", 0, MM_FEATURE_CACHE_SIZE), ("cuda_ipc", 8, 0))
    for transport, cache, kept in cases:
        monkeypatch.setattr(QwenVLProcessor, "keep_mm_features_on_device", transport == "cuda_ipc")
        model = models["qwen2_5_vl"]
        with sglang_processor(
            QwenVLProcessor,
            model.config,
            model.processor,
            pevlm={"media_memory_mb": 70, "media_cache_mb": cache},
            attributes={CHOSEN: "cuda:2"},
        ) as processor:
            device = processor.sglang.pixel_device
        assert device.device == torch.device("cuda", 2)
        assert (device._memory, device._room) == (70 << 20, kept)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_patches_of_a_device_reach_the_transport(
    models: dict[str, Model],
    start: Start,
    clip: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kept: int,
) -> None:
    """As they were written, without a copy in between; and their room is given back. The CPU is in
    the GPU's place, and SGLang's pool of GPU memory is one that takes a copy."""
    processor = start(name, video=FEW, pevlm={"media_cache_mb": 0, "block_frames": 4})
    device = PixelDevice(torch.device("cpu"), 1 << 20, kept)
    processor.sglang.pixel_device = device
    written: list[int] = []
    sent: list[int] = []
    empty = device.empty

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        written.append(made.data_ptr())
        assert device._room < kept or not kept
        return made

    def wrap(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.data_ptr())
        return tensor.clone()

    monkeypatch.setattr(device, "empty", watched)
    if kept:
        monkeypatch.setattr(processor.sglang, "mm_feature_transport", "cuda_ipc")
        monkeypatch.setattr(processor.sglang, "use_cuda_ipc", True)
        monkeypatch.setattr(processor.sglang, "_wrap_tensor_for_cuda_ipc", wrap)
    video = clip(37, (202, 114), 7.5)
    output = processor(PROMPT, [str(video)])
    assert_same(output, reference(models[name], name, [(video, FEW)], PROMPT))
    assert len(written) == 2  # clips
    assert sent == (written if kept else [])
    del output
    gc.collect()
    assert device._room == kept


# --- Settings of a request ----------------------------------------------------------------------

WISHES = [
    {"fps": 1},
    {"fps": 0.3},
    {"max_frames": 6},
    {"max_pixels": 9000},
    {"fps": 4, "max_frames": 9, "max_pixels": 12_000},
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_wish_of_a_request(
    models: dict[str, Model],
    start: Start,
    clip: Callable[..., Path],
    name: str,
    wish: dict[str, Any],
) -> None:
    """As if the server had been started so; by mapping (``/generate``) and by ``VideoData``."""
    from sglang.srt.utils import VideoData

    video = clip(60, (202, 114))
    processor = start(name, video=FEW)
    expected = reference(models[name], name, [(video, {**FEW, **wish})], PROMPT)
    assert_same(processor(PROMPT, [{"url": str(video), **wish}]), expected)
    assert_same(processor(PROMPT, [VideoData(str(video), preprocess_kwargs=wish)]), expected)
    without = processor(PROMPT, [str(video)])
    assert grids(without) != expected["video_grid_thw"].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_two_videos_with_wishes_of_their_own(
    models: dict[str, Model], start: Start, clip: Callable[..., Path], name: str
) -> None:
    first, second = clip(40, (202, 114)), clip(28, (84, 112), seed=1)
    prompt = PROMPT.replace(VIDEO, f"{VIDEO} and {VIDEO}")
    videos = [{"url": str(first), "fps": 1, "max_pixels": 9000}, {"url": str(second), "fps": 3}]
    settings = [(first, {**FEW, "fps": 1, "max_pixels": 9000}), (second, {**FEW, "fps": 3})]
    output = start(name, video=FEW)(prompt, videos)
    expected = reference(models[name], name, settings, prompt)
    assert_same(output, expected)


def test_server_that_fixes_the_number_of_frames(start: Start, clip: Callable[..., Path]) -> None:
    video = clip(60, (112, 84))
    processor = start("qwen2_5_vl", video={**FEW, "nframes": 20})
    for wish, steps in (
        ({}, 10),
        ({"max_frames": 8}, 4),
        ({"max_frames": 64}, 10),
        ({"fps": 1}, 7),
        ({"fps": 2, "max_frames": 12}, 6),
    ):
        assert grids(processor(PROMPT, [{"url": str(video), **wish}]))[0][0] == steps


def test_other_wishes_are_another_video_to_the_cache(
    start: Start, clip: Callable[..., Path]
) -> None:
    """Prefix caching knows a clip by its hash."""
    processor = start("qwen2_5_vl", video=FEW)

    def hashed(**wish: Any) -> int:
        output = processor(PROMPT, [{"url": str(clip(24, (112, 84))), **wish}])
        [item] = output.mm_items
        assert len(pixels(output)) == prod(*grids(output))
        return int(item.hash)

    wishes: list[dict[str, Any]] = [{}, {"fps": 1}, {"max_frames": 2}, {"max_pixels": 4000}]
    assert len({hashed(**wish) for wish in wishes}) == len(wishes)
    assert hashed(fps=1) == hashed(fps=1, max_pixels=600_000)  # the same frames


@pytest.mark.parametrize("name", MODELS)
def test_a_longer_video_begins_with_the_same_clips(
    start: Start, clip: Callable[..., Path], name: str
) -> None:
    """Of whole clips; and those that follow are new."""
    frames = np.random.default_rng(0).integers(0, 256, (44, 84, 112, 3), np.uint8)
    processor = start(name, video=FEW)
    short, long = (
        [item.hash for item in processor(PROMPT, [frames[:count]]).mm_items] for count in (36, 44)
    )
    assert (len(short), len(long)) == (3, 3)
    assert [a == b for a, b in zip(short, long, strict=True)] == [True, True, False]


@pytest.mark.parametrize(
    ("server", "wish", "message"),
    [
        ({}, {"fps": 0}, "fps: expected a number of more than 0, got 0"),
        ({}, {"fps": "2"}, "fps: expected a number"),
        ({}, {"max_frames": 769}, "max_frames: expected at most 768, the server's limit, got 769"),
        ({"max_frames": 10}, {"max_frames": 11}, "max_frames: expected at most 10"),
        ({}, {"max_frames": 1.5}, "max_frames: expected a whole number"),
        ({}, {"max_frames": 1}, "max_frames: expected at least 2 sampled frames, got 1"),
        ({}, {"max_pixels": 602_113}, "max_pixels: expected at most 602112, the server's limit"),
        ({"max_pixels": 5000}, {"max_pixels": 5001}, "max_pixels: expected at most 5000"),
        ({"resized_height": 56, "resized_width": 56}, {"max_pixels": 9000}, "max_pixels: expected"),
        ({}, {"length": 3}, "video length: expected one of fps, max_frames, max_pixels"),
        ({}, {"frames": 3}, "frames: expected 'keyframes', got 3"),
    ],
)
def test_bad_wish(
    start: Start,
    clip: Callable[..., Path],
    server: dict[str, Any],
    wish: dict[str, Any],
    message: str,
) -> None:
    video = str(clip(12, (112, 84)))
    processor = start("qwen2_5_vl", video={**FEW, **server})
    with pytest.raises(ValueError, match=message):
        processor(PROMPT, [{"url": video, **wish}])
    assert processor(PROMPT, [video]).input_ids  # the next request is served


def test_wish_below_the_servers_least(start: Start, clip: Callable[..., Path]) -> None:
    """As in qwen-vl-utils, whose bounds must leave room for a frame."""
    video = {"url": str(clip(12, (112, 84))), "max_pixels": 50_000}
    with pytest.raises(ValueError, match="max_pixels: expected at least min_pixels, 100352 here"):
        start("qwen2_5_vl")(PROMPT, [video])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("frames", "rate"), [(8, None), (7, None), (1, None), (6, 0.5)])
def test_frames_instead_of_a_file(
    models: dict[str, Model],
    start: Start,
    clip: Callable[..., Path],
    name: str,
    frames: int,
    rate: float | None,
) -> None:
    """All of them, at two a second or at the rate that the request says, as in qwen-vl-utils."""
    from PIL import Image
    from torchcodec.decoders import VideoDecoder

    size = (112, 56) if PATCH[name] == 14 else (128, 64)  # where qwen-vl-utils does not resize
    decoder = VideoDecoder(str(clip(20, size)), dimension_order="NHWC")
    arrays = decoder.get_frames_at(list(range(frames))).data.numpy()
    pictures = [Image.fromarray(frame) for frame in arrays]
    wishes = {} if rate is None else {"sample_fps": rate}
    expected = reference(models[name], name, [(pictures, {**FEW, **wishes})], PROMPT)
    video: Any = pictures if rate is None else {"url": pictures, "fps": rate}
    output = start(name, video=FEW)(PROMPT, [video])
    assert_same(output, expected)
    if name != "qwen3_vl":
        config, ids = models[name].config, expected["input_ids"][0]
        assert torch.equal(output.mrope_positions, mrope_positions(config, expected, ids)[:, 0])


@pytest.mark.parametrize(
    ("count", "wishes", "message"),
    [
        (5, {}, "expected at most 4 frames in a list, the server's max_frames, got 5"),
        (4, {"max_frames": 2}, "max_frames: expected an encoded video, got frames"),
    ],
)
def test_frames_that_are_refused(start: Start, count: int, wishes: Any, message: str) -> None:
    frames = torch.zeros(count, 3, 56, 56, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        start("qwen2_5_vl", video={**FEW, "max_frames": 4})(PROMPT, [{"url": frames, **wishes}])


def test_a_request_has_files_and_frames(start: Start, clip: Callable[..., Path]) -> None:
    videos = [clip(8, (112, 84)), torch.zeros(4, 3, 56, 56, dtype=torch.uint8)]
    output = start("qwen2_5_vl", video=FEW)(
        PROMPT.replace("What", VIDEO), [str(videos[0]), videos[1]]
    )
    assert [row[0] for row in grids(output)] == [2, 2]


# --- Settings of the server ------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"fps": 0}, "--mm-process-config: fps: expected a number of more than 0, got 0"),
        ({"fps": "2"}, "fps: expected a number"),
        ({"max_frame": 8}, "video setting max_frame: expected one of fps, nframes"),
        ({"fps": 1, "nframes": 8}, "fps, nframes: expected one or the other, got both"),
        ({"resized_width": 8}, "resized_height, resized_width: expected both or none"),
        ({"max_pixels": 5000}, "max_pixels: expected at least min_pixels"),
        ({"max_frames": 1}, "--mm-process-config: max_frames: expected at least 2 sampled frames"),
        ({"nframes": 1}, "nframes: expected at least 2 sampled frames, got 1; this model sees 2 "),
    ],
)
def test_bad_settings_of_the_server(
    models: dict[str, Model], name: str, video: dict[str, Any], message: str
) -> None:
    from pevlm_sglang.errors import UnsupportedError
    from pevlm_sglang.families.registry import check_launch

    with pytest.raises(UnsupportedError, match=message):
        check_launch(models[name].config, video)
    for sound in ({"fps": 1, "max_frames": 64}, {"max_frames": 2}, {"nframes": 2}):
        check_launch(models[name].config, sound)


def test_our_wishes_of_a_chat_request() -> None:
    """In a process of its own: the request model of this one stays as it is."""
    import subprocess
    import sys

    code = """
import json
from pevlm_sglang.media.video_url import offer_wishes
offer_wishes()
offer_wishes()
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.parser.jinja_template_utils import process_content_for_template_format
url = {"url": "a.mp4", "fps": 1.5, "max_frames": 9, "max_pixels": 7000, "frames": "keyframes"}
body = {"model": "m", "messages": [
    {"role": "user", "content": [{"type": "video_url", "video_url": url}]}]}
message = ChatCompletionRequest.model_validate(body).messages[0].model_dump()
videos = []
process_content_for_template_format(message, "openai", [], videos, [], [])
print(json.dumps(videos[0].preprocess_kwargs), flush=True)
part = body["messages"][0]["content"][0]
for place, name, value in (
    (url, "max_pixels", "many"), (url, "max_frame", "many"), (part, "fps", "many"),
    (url, "frames", 3), (part, "frames", "keyframes"),
):
    before, place[name] = dict(place), value
    try:
        ChatCompletionRequest.model_validate(body)
    except ValueError as error:
        assert name in str(error)
    else:
        raise AssertionError(f"{name} passed")
    place.clear()
    place.update(before)
from sglang.srt.entrypoints.http_server import generate_contract_error as error
video = {"url": "a.mp4", "frames": "keyframes"}
for data in (video, [video], [[video], ["b.mp4"]], "b.mp4", None):
    assert error({"text": "a", "video_data": data}) is None, data
for data in ({**video, "frames": 3}, {**video, "frame": "a"}):
    assert error({"text": "a", "video_data": data}), data
assert "unknown field `frames`" in error({"text": "a", "image_data": video})
assert error([]) and error({"text": 3})
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kwargs = json.loads(out.stdout.splitlines()[-1])
    assert kwargs == {"fps": 1.5, "max_frames": 9, "max_pixels": 7000, "frames": "keyframes"}
