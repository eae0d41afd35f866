"""Whatever number a request sends: a ValueError (HTTP 400) within a second, and no memory."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from support.families import internvl_model, internvl_upstream, llava_video_tiny, longvila
from support.processor import sglang_processor, without_pinned_memory
from support.tiny import make_tiny_model
from support.video import write_video

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = {
    "qwen2_5_vl": (VIDEO, IMAGE),
    "internvl": ("<video>", "<image>"),
    "longvila": (longvila.VIDEO, longvila.IMAGE),
    "llava_video": ("<video>", "<image>"),
}
SECONDS, GROWTH = 1.0, 64 << 20
LONGEST = 4096  # tokens of a prompt

NUMBERS = (0, -1, 1e308, -1e308, 1e-320, math.nan, math.inf, 10**9, 2**63, 10**400)
STRANGE = (*NUMBERS, True, False, "", "x", "1", "9" * 5000)

FEATURES = torch.zeros(4, 1176)

WISHES = ("fps", "max_frames", "max_pixels", "nframes", "min_pixels", "total_pixels")
UPSTREAMS = ("max_tokens_per_frame", "max_image_tokens")  # SGLang's, for other models
OF_REQUEST = (
    *("max_dynamic_patch", "image_max_dynamic_patch", "video_max_dynamic_patch"),
    *("min_dynamic_patch", "video_config", "images_config", "mm_processor_kwargs"),
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=6, size=(112, 84)))


@contextmanager
def _qwen(directory: Path) -> Iterator[Any]:
    import transformers
    from sglang.srt.utils.hf_transformers.processor import get_processor

    from pevlm_sglang.families.qwen_vl.processor import QwenVLProcessor

    path = make_tiny_model(directory, architecture="qwen2_5_vl", num_layers=1, vision_depth=1)
    config = transformers.AutoConfig.from_pretrained(path)
    small = {"min_pixels": 3136}
    with sglang_processor(
        QwenVLProcessor, config, get_processor(str(path)), video=small
    ) as process:
        yield process.sglang


@contextmanager
def _internvl(directory: Path) -> Iterator[Any]:
    path = internvl_model.make_tiny_model(directory)
    with internvl_upstream.processor(path, video={"num_frames": 4}) as process:
        yield process.sglang


@contextmanager
def _longvila(directory: Path) -> Iterator[Any]:
    from sglang.srt.utils.hf_transformers_utils import get_config, get_processor

    from pevlm_sglang.families.longvila import checkpoint
    from pevlm_sglang.families.longvila.processor import LongVilaProcessor

    checkpoint.register()
    path = str(longvila.make_tiny_model(directory))
    config = get_config(path, trust_remote_code=False)
    with sglang_processor(
        LongVilaProcessor, config, get_processor(path, model_name=path)
    ) as process:
        yield process.sglang


@contextmanager
def _llava_video(directory: Path) -> Iterator[Any]:
    from sglang.srt.utils.hf_transformers_utils import get_processor
    from transformers import AutoConfig

    from pevlm_sglang.families.llava_video.checkpoint import load_processor
    from pevlm_sglang.families.llava_video.processor import LlavaVideoProcessor

    path = str(llava_video_tiny.make_tiny_model(directory))
    loaded = load_processor(get_processor, path, model_name=path)
    with sglang_processor(LlavaVideoProcessor, AutoConfig.from_pretrained(path), loaded) as process:
        yield process.sglang


BUILD = {
    "qwen2_5_vl": _qwen,
    "internvl": _internvl,
    "longvila": _longvila,
    "llava_video": _llava_video,
}


class Asked:
    """A processor, to which every request has one thing wrong."""

    def __init__(self, family: str, processor: Any, clip: str) -> None:
        self.family, self.processor, self.clip = family, processor, clip

    def __call__(
        self, *, video: Any = None, image: Any = None, limit: int = LONGEST, **fields: Any
    ) -> Any:
        """The processor's output for a request with a video or an image.

        Args:
            limit: tokens of a prompt.
            fields: of the request.
        """
        media = [] if video is None else [video], [] if image is None else [image]
        prompt = PROMPTS[self.family][0 if media[0] else 1] + "What?"
        request = SimpleNamespace(
            **{"video_data": media[0], "image_data": media[1], "audio_data": None, **fields}
        )
        work = self.processor.process_mm_data_async(
            image_data=media[1],
            audio_data=None,
            input_text=prompt,
            request_obj=request,
            max_req_input_len=limit,
        )
        with without_pinned_memory():
            return asyncio.run(work)

    def is_refused(self, what: str, **request: Any) -> str | None:
        """None, or what happened in place of a refusal within a second."""
        began = time.monotonic()
        try:
            self(**request)
        except ValueError as error:
            problem = None if str(error) else "refused without words"
        except Exception as error:
            problem = f"HTTP 500: {error!r:.200}"
        else:
            problem = "served"
        if (took := time.monotonic() - began) > SECONDS:
            problem = f"took {took:.1f} s"
        return problem and f"{what}: {problem}"


@pytest.fixture(scope="module", params=[*BUILD])
def asked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, clip: str
) -> Iterator[Asked]:
    with BUILD[request.param](tmp_path_factory.mktemp("model") / request.param) as processor:
        found = Asked(request.param, processor, clip)
        found(video=clip)  # what is sound is served
        found(image=Image.new("RGB", (1281, 719)))
        yield found


def requests(clip: str, picture: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All that a request can say, each with all that it should not."""
    from sglang.srt.utils import ImageData, VideoData

    for value in STRANGE:
        shown = repr(value)[:20]
        for name in (*WISHES, *UPSTREAMS):
            yield f"video {name}={shown}", {"video": {"url": clip, name: value}}
            told = VideoData(clip, preprocess_kwargs={name: value})
            yield f"VideoData {name}={shown}", {"video": told}
        for name in OF_REQUEST:
            yield f"{name}={shown} of a video", {"video": clip, name: value}
            yield f"{name}={shown} of an image", {"image": picture, name: value}
        yield f"modalities=[{shown}]", {"image": picture, "modalities": [value]}
        yield f"modalities={shown}", {"image": picture, "modalities": value}
        side = {"max_long_side_pixel": value}
        yield f"VideoData side={shown}", {"video": VideoData(clip, **side)}
        yield f"ImageData side={shown}", {"image": ImageData(clip, **side)}
        for kind in ("video", "image"):
            yield f"{kind} {shown}", {kind: value}
            yield f"{kind} url={shown}", {kind: {"url": value}}
            yield f"{kind} [{shown}]", {kind: [value]}
            for format_ in ("processor_output", "precomputed_embedding"):
                for name in ("feature", f"{kind}_grid_thw", "pixel_values_videos", "pixel_values"):
                    given = {"format": format_, name: value}
                    yield f"{kind} {format_} {name}={shown}", {kind: given}
                for grid in ([[1, 2, value]], [value], value):
                    given = {"format": format_, "feature": FEATURES, f"{kind}_grid_thw": grid}
                    yield f"{kind} {format_} grid={grid!r:.40}", {kind: given}


def test_every_extreme_is_refused(asked: Asked) -> None:
    picture = Image.new("RGB", (1281, 719))
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    tried = [*requests(asked.clip, picture)]
    problems = [asked.is_refused(what, **request) for what, request in tried]
    found = [problem for problem in problems if problem]
    assert not found, "\n".join([f"{len(found)} of {len(tried)}", *found])
    assert process.memory_info().rss - before < GROWTH
    asked(video=asked.clip)


def test_media_that_no_prompt_holds(asked: Asked) -> None:
    """A file of some kB whose frames would be hundreds of MB, and a picture in many tiles."""
    process = psutil.Process()
    before = process.memory_info().rss
    if asked.family == "internvl":
        most = int(asked.processor.max_context_len) // asked.processor.num_image_token
        wide = Image.new("RGB", (1281, 719))
        what = asked.is_refused("tiles", image=wide, max_dynamic_patch=most, limit=most)
    else:
        wish = {"fps": 1000.0} if asked.family == "qwen2_5_vl" else {"max_frames": 768}
        what = asked.is_refused("frames", video={"url": asked.clip, **wish}, limit=16)
    assert what is None
    assert process.memory_info().rss - before < GROWTH
