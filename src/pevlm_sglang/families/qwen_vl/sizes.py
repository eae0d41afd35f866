"""Sampled frames, pixels and tokens of a video in Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

The definition is qwen-vl-utils 0.0.14, ``smart_nframes`` and ``fetch_video``, with one liberty that
SGLang takes too: ``max_pixels`` may be set beyond 768 tokens. Qwen's own processors use it, and so
does this plugin's (``processor.py``), from here: what ``pevlm show`` predicts and what the
server does is one piece of code. The library is the tests' oracle and no dependency: its pixel
budget is not a function to call, but part of one that also downloads and decodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pevlm_sglang.families.sizes import (
    Geometry,
    Settings,
    VideoTokens,
    context_length,
    processor_settings,
    section,
    whole,
)

_FRAME_FACTOR = 2  # an even number of frames is sampled
_MAX_RATIO = 200  # of the longer side to the shorter
_MIN_TOKENS, _MAX_TOKENS = 128, 768  # of a sampled frame, before frames are merged into steps
_IMAGE_TOKENS = (4, 16_384)  # bounds that resized_height and resized_width obey
_TOTAL_TOKENS = 115_200  # of all steps together: 90 % of a context of 128,000


@dataclass(frozen=True)
class VideoSettings(Settings):
    """See the base. A token is a square of ``patch_size × merge_size`` pixels a side.

    Attributes:
        fps: frames sampled from a second of video.
        nframes: frames sampled from any video, in place of ``fps``; rounded to an even number.
        min_frames: lower bound of what ``fps`` gives.
        max_frames: upper bound of what ``fps`` gives.
        min_pixels: lower bound of a sampled frame after the resize; None = 128 tokens.
        max_pixels: upper bound of a sampled frame after the resize; None = 768 tokens, or what
            ``min_pixels`` asks for where that is more.
        total_pixels: bounds the pixels of all steps together, as far as ``min_pixels`` lets it;
            None = 115,200 tokens. The server's environment variable ``VIDEO_MAX_PIXELS`` sets it
            too.
        resized_height, resized_width: of a sampled frame, in place of the bounds; both or none.

    Raises:
        ValueError: see the base; one of the last two without the other; too few frames for a step.
    """

    fps: float = 2.0
    nframes: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError("resized_height, resized_width: expected both or none")
        most = {"max_frames": _multiple(self.max_frames, _FRAME_FACTOR, math.floor)}
        if self.nframes is not None:
            most["nframes"] = _multiple(self.nframes, _FRAME_FACTOR)
        for name, frames in most.items():
            if frames < _FRAME_FACTOR:
                raise ValueError(
                    f"{name}: expected at least {_FRAME_FACTOR} sampled frames, got "
                    f"{getattr(self, name)}; this model sees {_FRAME_FACTOR} frames as one step"
                )


@dataclass(frozen=True)
class QwenGeometry(Geometry):
    """See the base."""

    frames_per_step: int = 2

    setting_names = tuple(field.name for field in fields(VideoSettings))

    @property
    def has_timestamps(self) -> bool:
        """Whether the processor writes the time of each step into the video."""
        return self.model_type.startswith("qwen3")

    @property
    def default_prompt_tokens(self) -> int:
        """Of "You are a helpful assistant.", which Qwen2's chat template adds, and Qwen3's not."""
        return 0 if self.has_timestamps else 6

    def chat_template_tokens(self, prompt_tokens: int) -> tuple[int, int]:
        """Around ``<|im_start|>system⏎ … <|im_end|>⏎<|im_start|>user⏎<|vision_start|>``, and
        ``<|vision_end|> … <|im_end|>⏎<|im_start|>assistant⏎``. Qwen3's template has no system turn
        without a system prompt."""
        has_system_turn = prompt_tokens > 0 or not self.has_timestamps
        return 4 + 5 * has_system_turn, 6

    @property
    def factor(self) -> int:
        """Pixels a side of a token, which a resized frame's sides are multiples of."""
        return self.patch_size * self.merge_size

    def settings(self, values: Mapping[str, Any]) -> VideoSettings:
        """See the base; bounds must leave room for a frame too."""
        settings = VideoSettings.of(values, self.setting_names)
        if "fps" in values and "nframes" in values:
            raise ValueError("fps, nframes: expected one or the other, got both")
        least = self.min_pixels(settings)
        if settings.max_pixels is not None and settings.max_pixels < least:
            raise ValueError(
                f"max_pixels: expected at least min_pixels, {least:g} here, got "
                f"{settings.max_pixels:g}; --mm-process-config lowers min_pixels"
            )
        return settings

    def limits(self, settings: VideoSettings) -> dict[str, float]:
        """See the base. Frames at a high rate are bounded by ``max_frames``."""
        limits = {"fps": math.inf, "max_frames": settings.max_frames}
        if settings.resized_width is None:
            limits["max_pixels"] = self.max_pixels(settings)
        return limits

    def min_pixels(self, settings: VideoSettings) -> float:
        """The smallest sampled frame after the resize."""
        return settings.min_pixels or _MIN_TOKENS * self.factor**2

    def max_pixels(self, settings: VideoSettings) -> float:
        """The largest sampled frame after the resize, in a short video."""
        if settings.max_pixels is not None:
            return settings.max_pixels
        return max(_MAX_TOKENS * self.factor**2, int(self.min_pixels(settings) * 1.05))

    def sampled_frames(self, total_frames: int, fps: float, settings: VideoSettings) -> int:
        """How many frames of a file are sampled.

        Raises:
            ValueError: the file has too few frames.

        Source: ``smart_nframes`` of qwen-vl-utils.
        """
        if settings.nframes is not None:
            frames = _multiple(settings.nframes, _FRAME_FACTOR)
        else:
            least = _multiple(settings.min_frames, _FRAME_FACTOR, math.ceil)
            wanted = total_frames / fps * settings.fps
            bounded = min(max(wanted, least), settings.max_frames, total_frames)
            frames = _multiple(bounded, _FRAME_FACTOR, math.floor)
        if frames < _FRAME_FACTOR:
            raise ValueError(
                f"video: expected at least {_FRAME_FACTOR} frames, which this model sees as one "
                f"step, got {total_frames}; send a single frame as an image"
            )
        if frames > total_frames:
            raise ValueError(
                f"nframes: expected at most the video's {total_frames} frames, got {frames}; a "
                "request with fps or max_frames takes fewer"
            )
        return frames

    def resized(
        self, frames: int, size: tuple[int, int], settings: VideoSettings
    ) -> tuple[int, int]:
        """Width and height of a sampled frame after the resize.

        Args:
            frames: sampled frames.
            size: of the file.

        Raises:
            ValueError: a frame too long and narrow.

        Source: ``fetch_video`` and ``smart_resize`` of qwen-vl-utils.
        """
        if settings.resized_width is not None and settings.resized_height is not None:
            size = (settings.resized_width, settings.resized_height)
            least, most = (float(tokens * self.factor**2) for tokens in _IMAGE_TOKENS)
        else:
            least = self.min_pixels(settings)
            total = settings.total_pixels or _TOTAL_TOKENS * self.factor**2
            share = max(total / frames * _FRAME_FACTOR, int(least * 1.05))
            most = min(self.max_pixels(settings), share)
        width, height = size
        if min(size) < 1 or max(size) / min(size) > _MAX_RATIO:
            raise ValueError(
                f"size: expected sides of at least 1 pixel and a ratio of at most {_MAX_RATIO}, "
                f"got {width}x{height}"
            )
        new_width, new_height = self._within(least, most, size)
        if 0 in (new_width, new_height):
            raise ValueError(
                f"size: {width}x{height} is too narrow, it would be resized to "
                f"{new_width}x{new_height}; raise max_pixels"
            )
        return new_width, new_height

    def _within(self, least: float, most: float, size: tuple[int, int]) -> tuple[int, int]:
        """``size`` in multiples of the factor; where that breaks a bound, scaled to the bound and
        rounded to the inner side of it."""
        factor = self.factor
        width, height = (max(factor, _multiple(side, factor)) for side in size)
        if width * height > most:
            shrink = math.sqrt(size[0] * size[1] / most)
            width, height = (_multiple(side / shrink, factor, math.floor) for side in size)
        elif width * height < least:
            grow = math.sqrt(least / (size[0] * size[1]))
            width, height = (_multiple(side * grow, factor, math.ceil) for side in size)
        return width, height

    def sample(self, sampled: int, settings: VideoSettings) -> tuple[int, float]:
        frames = self.sampled_frames(sampled, settings.fps, settings)
        if frames != sampled:
            raise ValueError(
                f"{sampled} sampled frames: SGLang would sample {frames} here, an even number "
                f"up to max_frames ({settings.max_frames}), or nframes where that is set"
            )
        return sampled, settings.fps

    def video(
        self, total_frames: int, fps: float, size: tuple[int, int], settings: VideoSettings
    ) -> VideoTokens:
        frames = self.sampled_frames(total_frames, fps, settings)
        width, height = self.resized(frames, size, settings)
        rows, columns = height // self.patch_size, width // self.patch_size
        num_steps = -(-frames // self.frames_per_step)
        pads = rows * columns // self.merge_size**2
        steps = [pads] * num_steps
        if self.has_timestamps:
            seconds = self._timestamps(total_frames, fps, frames)
            steps = [pads + _timestamp_tokens(time) for time in seconds]
        return VideoTokens(frames, tuple(steps), (width, height), (num_steps, rows, columns))

    def _timestamps(self, total_frames: int, fps: float, frames: int) -> list[float]:
        """The time of each step: the mean of its first and its last frame's, in seconds.

        The server samples in fp32, which in a file of many thousand frames may take a frame's
        neighbour.

        Source: ``_calculate_timestamps`` in transformers' processing_qwen3_vl.py.
        """
        each = self.frames_per_step
        times = [round(i * (total_frames - 1) / (frames - 1)) / fps for i in range(frames)]
        times += [times[-1]] * (-frames % each)
        return [(times[i] + times[i + each - 1]) / 2 for i in range(0, len(times), each)]


def _timestamp_tokens(seconds: float) -> int:
    """Tokens of ``<12.5 seconds><|vision_start|>`` and ``<|vision_end|>``: one a digit, and one
    each for ``<``, the point, `` seconds``, ``>`` and the vision tokens."""
    return len(f"{seconds:.1f}") + 5


PUBLISHED = {
    geometry.model_type: geometry
    for geometry in (
        QwenGeometry("qwen2_5_vl", context_length=128_000),
        QwenGeometry("qwen2_vl", context_length=32_768),
        QwenGeometry("qwen3_vl", patch_size=16, context_length=262_144),
        QwenGeometry("qwen3_vl_moe", patch_size=16, context_length=262_144),
    )
}
"""Of the published checkpoints; the context is ``max_position_embeddings`` of ``config.json``."""


def of_checkpoint(config: Mapping[str, Any], directory: Path) -> QwenGeometry:
    """See :class:`~pevlm_sglang.families.sizes.SizeRules`."""
    model_type = str(config.get("model_type"))
    if model_type not in PUBLISHED:
        raise ValueError(
            f"model_type {model_type}: expected one of {', '.join(PUBLISHED)}; "
            "the token counts of other models are not known here"
        )
    settings = processor_settings(directory)
    vision = section(config, "vision_config", {})
    sizes: dict[str, int] = {}
    for ours, name, in_config in (
        ("patch_size", "patch_size", "patch_size"),
        ("merge_size", "merge_size", "spatial_merge_size"),
        ("frames_per_step", "temporal_patch_size", "temporal_patch_size"),
    ):
        default = getattr(PUBLISHED[model_type], ours)
        sizes[ours] = whole(settings, name, default)
        if (wanted := whole(vision, in_config, default)) != sizes[ours]:
            raise ValueError(
                f"{name}: config.json of {directory} says {wanted}, its processor files say "
                f"{sizes[ours]}"
            )
    text = section(config, "text_config", config)
    return QwenGeometry(model_type, **sizes, context_length=context_length(text))


def _multiple(number: float, factor: int, rounding: Callable[[float], int] = round) -> int:
    return rounding(number / factor) * factor
