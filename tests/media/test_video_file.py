"""What a broken video file costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pevlm_sglang.media.video_file import decoded, decoding, length_and_rate
from support.video import write_video


@pytest.mark.parametrize("rate", [None, 0, float("nan"), float("inf"), -1.0])
def test_file_without_a_rate_is_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="video: expected a frame rate, got"):
        length_and_rate(Video(3, rate))


def test_file_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="video: expected at least one frame, got none"):
        length_and_rate(Video(0, 25.0))


def test_length_and_rate() -> None:
    assert length_and_rate(Video(70, 25)) == (70, 25.0)


def test_frame_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 67108864 pixels .*, got 8192 x 8193"):
        length_and_rate(Video(3, 25.0, frame_shape=(8193, 8192)))


def test_stream_that_breaks_off_is_refused() -> None:
    with pytest.raises(ValueError, match="video: could not be decoded: no more packets"):
        decoded(Video(100, 25.0, broken_at=40), [*range(100)])


def raise_in(module: str, error: Exception) -> None:
    """As a function of that module raises it."""
    place: dict[str, Any] = {"__name__": module}
    exec("def fail(error):\n    raise error", place)
    place["fail"](error)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("torchcodec._core.ops", torch.OutOfMemoryError("CUDA out of memory")),
        ("torchcodec._core.ops", torch.AcceleratorError("CUDA error: device-side assert")),
        ("torch.nn.functional", RuntimeError("shape mismatch")),
        ("torchvision.transforms", RuntimeError("could not be resized")),
    ],
)
def test_faults_of_the_server_are_not_the_clients(module: str, error: Exception) -> None:
    """An HTTP 400 would blame the file, and the operator would never see the error."""
    with pytest.raises(type(error), match=str(error)), decoding():
        raise_in(module, error)


def test_a_real_file_that_breaks_off_is_refused(tmp_path: Path) -> None:
    """By the decoder that SGLang takes."""
    video_decoder = pytest.importorskip("sglang.srt.utils.video_decoder")
    path = write_video(tmp_path / "clip.mp4", seconds=20, size=(160, 120))
    content = bytearray(path.read_bytes())
    start, end = len(content) // 3, len(content) // 2
    content[start:end] = b"\xff" * (end - start)
    path.write_bytes(content)
    decoder = video_decoder.VideoDecoderWrapper(str(path))
    with pytest.raises(ValueError, match="video: could not be decoded"):
        decoded(decoder, [*range(len(decoder))])


class Video:
    """The part of SGLang's ``VideoDecoderWrapper`` that is read."""

    def __init__(
        self,
        frames: int,
        rate: Any,
        broken_at: int | None = None,
        frame_shape: tuple[int, int] = (2, 2),
    ) -> None:
        self.frames, self.avg_fps, self.broken_at = frames, rate, broken_at
        self.frame_shape = frame_shape

    def __len__(self) -> int:
        return self.frames

    def get_frames_at(self, indices: list[int]) -> np.ndarray:
        if self.broken_at is not None and max(indices) >= self.broken_at:
            raise_in("torchcodec._core.ops", RuntimeError("no more packets"))
        return np.stack([np.full((2, 2, 3), i, np.uint8) for i in indices])
