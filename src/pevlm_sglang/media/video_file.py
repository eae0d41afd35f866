"""Reading a video file. What is wrong with a file costs its request HTTP 400, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import torch

from pevlm_sglang.media import limits

_DECODERS = ("torchcodec", "decord")  # the two that SGLang takes
_SERVERS = (torch.OutOfMemoryError, torch.AcceleratorError)


def length_and_rate(video: Any) -> tuple[int, float]:
    """Frames, and frames a second, of SGLang's ``VideoDecoderWrapper``.

    Raises:
        ValueError: a file without frames, one that does not say its rate, or one beyond the
            server's limits.
    """
    frames, rate = len(video), video.avg_fps
    if not frames:
        raise ValueError("video: expected at least one frame, got none")
    if not rate or not 0 < rate < math.inf:
        raise ValueError(f"video: expected a frame rate, got {rate}")
    height, width = video.frame_shape
    limits.limits.check_video(frames, float(rate), (width, height))
    return frames, float(rate)


@contextmanager
def decoding() -> Iterator[None]:
    """A block that decodes frames.

    Raises:
        ValueError: a stream that breaks off, for which the decoder has a ``RuntimeError``. Others,
            the GPU's for instance, are the server's and not the client's, and pass.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, _SERVERS) or not _is_raised_by(_DECODERS, error):
            raise
        raise ValueError(f"video: could not be decoded: {error}") from error


def frame_bytes(video: Any) -> int:
    """Bytes of a decoded frame of full size."""
    height, width = video.frame_shape
    return 3 * int(height) * int(width)


def _is_raised_by(packages: Sequence[str], error: BaseException) -> bool:
    """Whether an error came through one of these packages."""
    names = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return any(name.split(".")[0] in packages for name in names)


def decoded(video: Any, indices: list[int]) -> torch.Tensor:
    """Frames ``[n, height, width, 3]`` uint8 of SGLang's ``VideoDecoderWrapper``, on the device on
    which it decodes.

    Raises:
        ValueError: see :func:`decoding`.
    """
    with decoding():
        return torch.as_tensor(video.get_frames_at(indices))
