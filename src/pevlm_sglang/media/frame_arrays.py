"""Frames in place of a file: pictures in a list or in one array, sampled by whoever sends them.

All of them are taken, at two a second unless the request says ``fps`` beside them, as qwen-vl-utils
takes a list; and resized as a file's, where that resizes twice, to multiples of four patches first.
SGLang hands them to transformers without a rate, which takes 24 a second for granted, and samples
what is sampled already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.media.wishes import Wishes

FRAMES_A_SECOND = 2.0  # ``sample_fps`` of ``fetch_video`` in qwen-vl-utils

_KINDS = Image.Image | np.ndarray | torch.Tensor


class FrameArrays(VideoDecoderWrapper):
    """Frames behind the interface by which files are read.

    Attributes:
        avg_fps: frames a second.
        frame_shape: height and width.
    """

    avg_fps = FRAMES_A_SECOND  # in place of properties
    frame_shape = 0, 0

    def __init__(self, frames: np.ndarray[Any, Any]) -> None:
        """``frames``: ``[n, height, width, 3]`` uint8."""
        self._frames = frames
        self.frame_shape = frames.shape[1], frames.shape[2]

    def __len__(self) -> int:
        return len(self._frames)

    def __del__(self) -> None: ...

    def get_frames_at(self, indices: list[int]) -> np.ndarray[Any, Any]:
        return self._frames[indices]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the frames; their shape is known to whoever asks."""
        return hashlib.sha256(np.ascontiguousarray(self._frames).data).digest()

    def heed(self, wish: Wishes, most: float) -> Wishes:
        """What a request wishes of these frames: their rate is taken down here.

        Args:
            most: frames, by the server.

        Raises:
            ValueError: more frames than that, or a wish for fewer than there are, or for keyframes.
        """
        if wish.max_frames is not None:
            raise ValueError(
                "max_frames: expected an encoded video, got frames, all of which are taken; send "
                "fewer"
            )
        if wish.frames is not None:
            raise ValueError(
                f"frames: expected an encoded video, got frames, none of which is a keyframe, with "
                f"{wish.frames!r}"
            )
        if len(self) > most:
            raise ValueError(
                f"video: expected at most {most:g} frames in a list, the server's max_frames, got "
                f"{len(self)}; --mm-process-config raises it"
            )
        if wish.fps is not None:
            self.avg_fps = float(wish.fps)
        return Wishes(max_frames=len(self), max_pixels=wish.max_pixels)


def frame_arrays(source: Any) -> FrameArrays | None:
    """The frames of a list of pictures or of an array; None for everything else.

    Args:
        source: PIL pictures, arrays or tensors in a list; or one array or tensor of four
            dimensions. Channels first or last, three of them; uint8, or whole numbers to 255 in
            another type, which is what qwen-vl-utils returns.

    Raises:
        ValueError: what is wrong with them.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        if source.ndim != 4:
            raise ValueError(f"video: expected four dimensions, got {tuple(source.shape)}")
        return FrameArrays(_last(_bytes(source)))
    if not isinstance(source, list | tuple):
        return None
    for frame in source:
        if not isinstance(frame, _KINDS):
            raise ValueError(f"video: expected pictures in a list, got {str(frame)[:100]}")
    if not source:
        raise ValueError("video: expected at least one frame, got an empty list")
    return FrameArrays(_stacked([_one(frame) for frame in source]))


def _one(frame: Any) -> np.ndarray[Any, Any]:
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    if frame.ndim != 3:
        raise ValueError(f"video frame: expected three dimensions, got {tuple(frame.shape)}")
    return _last(_bytes(frame)[None])[0]


def _stacked(frames: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if len(sizes := {frame.shape for frame in frames}) > 1:
        (a, b, _), (c, d, _) = sorted(sizes)[:2]
        raise ValueError(f"video: expected frames of one size, got {b}x{a} and {d}x{c}")
    return np.stack(frames)


def _bytes(array: Any) -> np.ndarray[Any, Any]:
    """uint8, of an array or tensor."""
    values: np.ndarray[Any, Any]
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        values = (array.float() if array.is_floating_point() else array).numpy()
    else:
        values = array
    if values.dtype == np.uint8:
        return values
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise ValueError(f"video: expected uint8 in an array of frames, got {values.dtype}")
    with np.errstate(invalid="ignore"):  # NaN is no whole number either
        made = values.astype(np.uint8)
    if not np.array_equal(made, values):
        raise ValueError(
            f"video: expected uint8 or whole numbers from 0 to 255 in an array of frames, got "
            f"{values.dtype} with others; send pixels that are not normalized"
        )
    return made


def _last(frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``[n, height, width, 3]``, of that or ``[n, 3, height, width]``."""
    if 0 in frames.shape:
        raise ValueError(f"video: expected at least one frame, got an array {frames.shape}")
    if frames.shape[3] == 3:
        return frames
    if frames.shape[1] == 3:
        return frames.transpose(0, 2, 3, 1)
    raise ValueError(
        f"video: expected three channels, first or last of a frame, got {frames.shape[1:]}"
    )
