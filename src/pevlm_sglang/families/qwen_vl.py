"""Qwen2-VL and Qwen2.5-VL: one offset a video, split into equal steps.

The chat template writes ``<|vision_start|>`` and ``<|vision_end|>`` around a video, and the
processor expands one pad between them to ``T × H × W / merge²`` tokens, step after step. Several
videos may share one item: offset i belongs to row i of ``video_grid_thw``.
Source: sglang/srt/multimodal/processors/qwen_vl.py.

The second half predicts, from a video's length and size alone, the frames that SGLang samples and
the tokens that they become.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pevlm_sglang.frames import FrameSpanError, Prompt, image_ranges, item_ranges
from pevlm_sglang.layout import FrameSpans

__all__ = ["ARCHITECTURES", "frames_per_step", "image_ranges", "video_spans"]

ARCHITECTURES: tuple[str, ...] = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)


def frames_per_step(hf_config: Any) -> int:
    """Sampled frames that the vision tower merges into one step."""
    return int(hf_config.vision_config.temporal_patch_size)


def video_spans(inputs: Any, prompt: Prompt, frames_per_step: int) -> list[FrameSpans]:
    """The videos of a request. The prompt holds no text of the processor.

    Raises:
        FrameSpanError: offsets and grid of an item do not fit together.
    """
    return [
        video
        for item in inputs.mm_items
        if item.is_video()
        for video in _videos(item, frames_per_step)
    ]


def _videos(item: Any, frames_per_step: int) -> list[FrameSpans]:
    """The videos of one VIDEO item."""
    ranges = item_ranges(item)
    grid = item.model_specific_data.get("video_grid_thw")
    if grid is None:
        raise FrameSpanError("video item: expected video_grid_thw, got none")
    rows = grid.tolist() if hasattr(grid, "tolist") else grid
    if len(rows) != len(ranges):
        raise FrameSpanError(
            f"video item: expected one offset a video ({len(rows)} in video_grid_thw), "
            f"got {len(ranges)}"
        )
    return [
        FrameSpans(tuple(_equal_steps(start, end, int(row[0]))), frames_per_step)
        for (start, end), row in zip(ranges, rows, strict=True)
    ]


def _equal_steps(start: int, end: int, steps: int) -> list[tuple[int, int]]:
    length, rest = divmod(end - start, max(steps, 1))
    if steps < 1 or rest or length < 1:
        raise FrameSpanError(
            f"video of {steps} steps: expected a number of tokens that splits into equal steps, "
            f"got {end - start}"
        )
    return [(start + i * length, start + (i + 1) * length) for i in range(steps)]


# SGLang's own constants, in processors/qwen_vl.py of sglang.srt.multimodal.
_FACTOR = 28  # pixels: its first resize rounds a side to this, whatever the model's patch size
_FRAME_FACTOR = 2  # it samples an even number of frames
_MAX_RATIO = 200  # of the longer side to the shorter

CHAT_TEMPLATE_TOKENS = (9, 6)
"""Tokens of the chat template around the user's text, for one video that is followed by the
question: ``<|im_start|>system⏎ … <|im_end|>⏎<|im_start|>user⏎<|vision_start|>``, and
``<|vision_end|> … <|im_end|>⏎<|im_start|>assistant⏎``."""

DEFAULT_SYSTEM_PROMPT_TOKENS = 6
"""Of "You are a helpful assistant.", which the chat template adds to a chat without one."""


@dataclass(frozen=True)
class VideoKnobs:
    """The keys of SGLang's ``--mm-process-config '{"video": {...}}'`` that take effect.

    Attributes:
        fps: frames sampled from a second of video.
        nframes: frames sampled from any video, in place of ``fps``; rounded to an even number.
        min_frames: lower bound of what ``fps`` gives.
        max_frames: upper bound of what ``fps`` gives.
        min_pixels: lower bound of a sampled frame after the resize.
        max_pixels: upper bound of a sampled frame after the resize; None = 602112 (768 tokens a
            step), or what ``min_pixels`` asks for where that is more.
        total_pixels: bounds the pixels of all steps together, as far as ``min_pixels`` lets it;
            the server's environment variable ``VIDEO_MAX_PIXELS`` sets it too.

    Raises:
        ValueError: a value that is not positive.
    """

    fps: float = 2.0
    nframes: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * _FACTOR**2
    max_pixels: int | None = None
    total_pixels: int = 115_200 * _FACTOR**2

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(knob.name for knob in dataclasses.fields(cls))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> VideoKnobs:
        """The knobs in the ``video`` section of the server's flag.

        Raises:
            ValueError: a name or a value that is not one of a knob, or fps beside nframes.
        """
        if unknown := [name for name in values if name not in cls.names()]:
            raise ValueError(f"video knob {unknown[0]}: expected one of {', '.join(cls.names())}")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        if "fps" in values and "nframes" in values:
            raise ValueError("fps, nframes: SGLang takes one or the other, got both")
        return cls(**values)

    def given(self) -> dict[str, float]:
        """The knobs that are not at their default, as the server's flag takes them."""
        return {
            knob.name: value
            for knob in dataclasses.fields(self)
            if (value := getattr(self, knob.name)) != knob.default
        }


@dataclass(frozen=True)
class VideoProcessor:
    """What the token count takes from a checkpoint's video processor.

    The defaults are those of the published Qwen2-VL and Qwen2.5-VL checkpoints.

    Attributes:
        patch_size: pixels a side of a patch of the vision tower.
        merge_size: patches a side that become one token.
        temporal_patch_size: sampled frames in a step.
        min_pixels, max_pixels: bounds of its own resize, which follows SGLang's.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 12_845_056


PUBLISHED = {"qwen2_vl": VideoProcessor(), "qwen2_5_vl": VideoProcessor()}
"""Video processor of the published checkpoints, by ``model_type``."""

PUBLISHED_CONTEXT = {"qwen2_vl": 32_768, "qwen2_5_vl": 128_000}
"""Tokens of context (``max_position_embeddings``) of the published checkpoints."""

# Where a checkpoint does not set the bounds: transformers' Qwen2VLVideoProcessor.size, and what
# get_processor in sglang/srt/utils/hf_transformers/processor.py puts over any "size" of Qwen2-VL.
_DEFAULT_SIZE = {"shortest_edge": 128 * _FACTOR**2, "longest_edge": 768 * _FACTOR**2}
_SIZE_OVERRIDE = {"qwen2_vl": {"shortest_edge": 3136, "longest_edge": 1_003_520}}


def video_processor(model_type: str, settings: Mapping[str, Any]) -> VideoProcessor:
    """The video processor of a checkpoint.

    Args:
        model_type: of ``config.json``.
        settings: the video processor's section of the checkpoint's processor files.

    Raises:
        ValueError: a model type or a setting whose token count is not known here.
    """
    if model_type not in PUBLISHED:
        raise ValueError(
            f"model_type {model_type}: expected one of {', '.join(PUBLISHED)}; "
            "the token counts of other models are not known here"
        )
    if settings.get("cap_pixels_per_frame") or not settings.get("do_resize", True):
        raise ValueError(
            "video processor: expected cap_pixels_per_frame false and do_resize true, as in the "
            "published checkpoints; the token counts of other settings are not known here"
        )
    published = VideoProcessor()
    size = _SIZE_OVERRIDE.get(model_type) or settings.get("size") or _DEFAULT_SIZE
    least = settings.get("min_pixels") or size.get("shortest_edge")
    most = settings.get("max_pixels") or size.get("longest_edge")
    if not least or not most:
        raise ValueError(f"video processor: expected shortest_edge and longest_edge, got {size}")
    return VideoProcessor(
        patch_size=int(settings.get("patch_size", published.patch_size)),
        merge_size=int(settings.get("merge_size", published.merge_size)),
        temporal_patch_size=int(settings.get("temporal_patch_size", published.temporal_patch_size)),
        min_pixels=int(least),
        max_pixels=int(most),
    )


def sampled_frames(total_frames: int, video_fps: float, knobs: VideoKnobs) -> int:
    """How many frames of a video SGLang samples.

    Args:
        total_frames: in the file.
        video_fps: of the file.
        knobs: of the server.

    Raises:
        ValueError: SGLang refuses the video, because it has too few frames.

    Source: ``smart_nframes`` in processors/qwen_vl.py of sglang.srt.multimodal.
    """
    if knobs.nframes is not None:
        frames = _rounded(knobs.nframes, _FRAME_FACTOR)
    else:
        least = _ceiled(knobs.min_frames, _FRAME_FACTOR)
        wanted = total_frames / video_fps * knobs.fps
        frames = _floored(min(max(wanted, least), knobs.max_frames, total_frames), _FRAME_FACTOR)
    if frames < _FRAME_FACTOR:
        raise ValueError(f"sampled frames: expected at least {_FRAME_FACTOR}, got {frames}")
    if frames > total_frames:
        raise ValueError(f"sampled frames: the video has only {total_frames}, got {frames}")
    return frames


def video_grid(
    frames: int, width: int, height: int, knobs: VideoKnobs, processor: VideoProcessor
) -> tuple[int, int, int]:
    """A video's row of ``video_grid_thw``: steps, patches in a column, patches in a row.

    Args:
        frames: sampled frames.
        width, height: of the file, in pixels.

    Raises:
        ValueError: a frame too long and narrow for SGLang.

    Source: ``preprocess_video`` in processors/qwen_vl.py of sglang.srt.multimodal, then the resize
    of transformers' ``Qwen2VLVideoProcessor``.
    """
    size = _sglang_size(frames, width, height, knobs)
    factor = processor.patch_size * processor.merge_size
    start = tuple(_rounded(side, factor) for side in size)
    bounds = processor.min_pixels, processor.max_pixels
    rows, columns = (
        max(factor, side) // processor.patch_size
        for side in _within(bounds, size, (start[0], start[1]), factor)
    )
    return -(-frames // processor.temporal_patch_size), rows, columns


def tokens_per_step(grid: tuple[int, int, int], processor: VideoProcessor) -> int:
    """Tokens of one step of a video; all steps have the same number."""
    _, rows, columns = grid
    return rows * columns // processor.merge_size**2


def _sglang_size(frames: int, width: int, height: int, knobs: VideoKnobs) -> tuple[int, int]:
    """Height and width after SGLang's own resize, the first of the two."""
    if min(width, height) < 1 or max(width, height) / min(width, height) > _MAX_RATIO:
        raise ValueError(
            f"size: expected sides of at least 1 pixel and a ratio of at most {_MAX_RATIO}, "
            f"got {width}x{height}"
        )
    share = knobs.total_pixels / frames * _FRAME_FACTOR
    most = max(min(knobs.max_pixels or 768 * _FACTOR**2, share), int(knobs.min_pixels * 1.05))
    bounds = knobs.min_pixels, min(knobs.max_pixels or most, most)
    start = (
        max(_FACTOR, _rounded(height, _FACTOR)),
        max(_FACTOR, _rounded(width, _FACTOR)),
    )
    size = _within(bounds, (height, width), start, _FACTOR)
    if 0 in size:
        raise ValueError(
            f"size: {width}x{height} is too narrow, it would be resized to {size[1]}x{size[0]}; "
            "raise max_pixels"
        )
    return size


def _within(
    bounds: tuple[float, float], size: tuple[int, int], start: tuple[int, int], factor: int
) -> tuple[int, int]:
    """``start``, or, where its area is out of bounds, ``size`` scaled to the bound it breaks and
    rounded to multiples of ``factor`` on the inner side of it."""
    least, most = bounds
    area = size[0] * size[1]
    if start[0] * start[1] > most:
        shrink = math.sqrt(area / most)
        return _floored(size[0] / shrink, factor), _floored(size[1] / shrink, factor)
    if start[0] * start[1] < least:
        grow = math.sqrt(least / area)
        return _ceiled(size[0] * grow, factor), _ceiled(size[1] * grow, factor)
    return start


def _rounded(number: float, factor: int) -> int:
    return round(number / factor) * factor


def _floored(number: float, factor: int) -> int:
    return math.floor(number / factor) * factor


def _ceiled(number: float, factor: int) -> int:
    return math.ceil(number / factor) * factor
