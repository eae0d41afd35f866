"""Frames in place of a video file: pictures that the client sampled itself.

They go the way of a decoded file from here, so that positions, resizing and prefix caching are the
same for both; but all of them are taken, and nothing says when they were seen. As in qwen-vl-utils
they count as 2 a second, unless the client gives their rate (``sample_fps``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

SAMPLE_FPS = 2.0
RATE = "sample_fps"

_KINDS = (list, tuple, np.ndarray, torch.Tensor)
_PICTURES = (Image.Image, np.ndarray, torch.Tensor)


def are_frames(source: Any) -> bool:
    """Whether this, in place of a video, is frames."""
    return isinstance(source, _KINDS)


@dataclass(frozen=True)
class GivenFrames:
    """Frames as a request gives them.

    Attributes:
        frames: pictures in a list (PIL, numpy, torch), or an array ``[n, height, width, 3]`` or
            ``[n, 3, height, width]``; of numbers from 0 to 255.
        fps: how many of them are a second.

    Raises:
        ValueError: no pictures, or a bad rate.
    """

    frames: Any
    fps: float = SAMPLE_FPS

    def __post_init__(self) -> None:
        rate: Any = self.fps
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if not number or not 0 < rate < math.inf:
            raise ValueError(f"{RATE}: expected a number of more than 0, got {rate!r}")
        if isinstance(self.frames, list | tuple):
            for frame in self.frames:
                if not isinstance(frame, _PICTURES) or getattr(frame, "ndim", 3) != 3:
                    raise ValueError(f"video: expected pictures in a list, got {_shown(frame)}")
        elif self.frames.ndim != 4:
            raise ValueError(
                "video: expected an array [frames, height, width, 3], got one of shape "
                f"{list(self.frames.shape)}; the frames of a video belong in one list"
            )
        if not len(self.frames):
            raise ValueError("video: expected at least one frame, got none")

    def __len__(self) -> int:
        return len(self.frames)

    def open(self) -> FrameVideo:
        """The frames as a decoder's.

        Raises:
            ValueError: they are not of one size, have no three channels or no numbers 0 to 255.
        """
        if not isinstance(self.frames, list | tuple):
            return FrameVideo(_channels_last(_uint8(self.frames)), self.fps)
        pictures = [_channels_last(_uint8(frame)) for frame in self.frames]
        if len(shapes := {picture.shape for picture in pictures}) > 1:
            raise ValueError(f"video: expected pictures of one size, got {sorted(shapes)[:3]}")
        return FrameVideo(np.stack(pictures), self.fps)


class FrameVideo(VideoDecoderWrapper):
    """Frames in memory, where SGLang has the decoder of a file.

    Args:
        frames: ``[n, height, width, 3]`` uint8.
        fps: see :class:`GivenFrames`.
    """

    def __init__(self, frames: np.ndarray, fps: float) -> None:
        self._frames, self._fps = np.ascontiguousarray(frames), float(fps)

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def avg_fps(self) -> float:
        return self._fps

    @property
    def frame_shape(self) -> tuple[int, int]:
        return self._frames.shape[1], self._frames.shape[2]

    def get_frames_at(self, indices: Sequence[int]) -> np.ndarray:
        return self._frames[list(indices)]

    def digest(self) -> bytes:
        """SHA-256 of the pixels and their shape."""
        shape = repr(self._frames.shape).encode()
        return hashlib.sha256(shape + hashlib.sha256(self._frames.data).digest()).digest()

    def close(self) -> None:
        """Nothing is open."""


def _shown(frame: Any) -> str:
    shape = getattr(frame, "shape", None)
    return str(frame)[:100] if shape is None else f"an array of shape {list(shape)}"


def _uint8(frame: Any) -> np.ndarray:
    if isinstance(frame, Image.Image):
        if "A" in frame.getbands() or "transparency" in frame.info:
            raise ValueError("video: expected pictures without transparency, got some with it")
        return np.asarray(frame.convert("RGB"))
    if isinstance(frame, torch.Tensor):
        frame = (frame.float() if frame.is_floating_point() else frame).numpy(force=True)
    return frame if frame.dtype == np.uint8 else _whole(frame)


def _whole(values: np.ndarray) -> np.ndarray:
    """uint8 of what qwen-vl-utils returns, whole numbers in fp32. Where none is more than 1, they
    may be pixels in another unit."""
    number = values.dtype.kind in "iuf"
    if number and values.size and 1 < values.max() <= 255 and values.min() >= 0:
        pixels = values.astype(np.uint8)
        if (pixels == values).all():
            return pixels
    raise ValueError(
        "video: expected frames of uint8, or of whole numbers from 0 to 255, got other values of "
        f"{values.dtype}"
    )


def _channels_last(values: np.ndarray) -> np.ndarray:
    """``[…, height, width, 3]``"""
    shape = values.shape
    first, last = (len(shape) > 2 and shape[axis] == 3 for axis in (-3, -1))
    if first == last or 0 in shape:
        raise ValueError(
            f"video: expected frames [height, width, 3] or [3, height, width], got {list(shape)}"
        )
    return np.moveaxis(values, -3, -1) if first else values
