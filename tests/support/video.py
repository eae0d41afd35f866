"""A real video file with sharp content."""

from __future__ import annotations

import base64
from pathlib import Path

CELL = 4  # pixels a side of one noise cell: fine, and still there after lossy coding


def write_video(
    path: Path,
    *,
    seconds: float,
    fps: float = 4.0,
    size: tuple[int, int] = (168, 112),
    seed: int = 0,
    codec: str = "libx264",
    group: int | None = None,
) -> Path:
    """Encode bars that move over noise, new in every frame, the same for the same seed.

    Sharp on purpose: on a smooth clip, a sink that is one step off or wrong temporal positions
    hardly change the answer.

    SGLang samples 2 frames a second for Qwen's models, and scales a frame up to at least 100352
    pixels (128 tokens a step) unless ``--mm-process-config '{"video": {"min_pixels": ...}}'`` says
    otherwise.

    Args:
        path: of the file; the suffix names the container, ``.mp4`` say.
        seconds: length, rounded to whole frames.
        fps: frames a second.
        size: (width, height), both even.
        seed: of the content.
        codec: an encoder of FFmpeg that takes a constant rate factor.
        group: frames from a keyframe to the next; None = what the encoder likes.

    Returns:
        ``path``

    Raises:
        ValueError: no frame, or an odd size.
    """
    import torch
    from torchcodec.encoders import VideoEncoder

    width, height = size
    num_frames = round(seconds * fps)
    if num_frames < 1:
        raise ValueError(f"seconds * fps: expected at least one frame, got {seconds} * {fps}")
    if width % 2 or height % 2:
        raise ValueError(f"size: expected an even width and height, got {width} x {height}")
    generator = torch.Generator().manual_seed(seed)
    cells = (num_frames, 3, -(-height // CELL), -(-width // CELL))
    noise = torch.randint(0, 256, cells, dtype=torch.uint8, generator=generator)
    frames = noise.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)[..., :height, :width]
    frames = frames.contiguous()
    bars = torch.randint(0, 256, (num_frames, 2, 3), dtype=torch.uint8, generator=generator)
    for i in range(num_frames):
        x, y = 11 * i % width, 7 * i % height
        frames[i, :, :, x : x + width // 6] = bars[i, 0, :, None, None]
        frames[i, :, y : y + height // 6, :] = bars[i, 1, :, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    VideoEncoder(frames, frame_rate=fps).to_file(
        path,
        codec=codec,
        pixel_format="yuv420p",
        crf=12,
        preset="ultrafast",
        extra_options={} if group is None else {"g": str(group)},
    )
    return path


def video_data_url(path: Path) -> str:
    """The file as the ``data:`` URL that goes into a chat message's ``video_url``."""
    kind = {".mp4": "mp4", ".mkv": "x-matroska", ".webm": "webm"}.get(path.suffix, "mp4")
    return f"data:video/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
