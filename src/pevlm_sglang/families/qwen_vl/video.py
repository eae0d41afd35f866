"""A video as qwen-vl-utils gives it: its sampled frames, resized."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from pevlm_sglang.families.qwen_vl.sizes import QwenGeometry, VideoSettings
from pevlm_sglang.media.video_file import decoding, length_and_rate, parts

_PIXELS_AT_ONCE = 1 << 26  # of a resize, which computes in fp32


def sample_and_resize(
    video: Any, geometry: QwenGeometry, settings: VideoSettings
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Frames ``[T, 3, H, W]`` uint8, and their metadata as transformers takes it.

    Args:
        video: SGLang's ``VideoDecoderWrapper``.

    Raises:
        ValueError: a video with too few frames, too large ones, or too long and narrow ones.

    Source: ``_read_video_torchcodec`` and ``fetch_video`` of qwen-vl-utils. Its frames are resized
    in one piece and cast to fp32 at the end, to the same values.
    """
    total, fps = length_and_rate(video)
    count = geometry.sampled_frames(total, fps, settings)
    indices = torch.linspace(0, total - 1, count).round().long().tolist()
    resized = []
    for part in parts(video, indices):
        with decoding():
            decoded = video.get_frames_as_tensor(part).permute(0, 3, 1, 2)
        size = decoded.shape[-1], decoded.shape[-2]
        width, height = geometry.resized(count, size, settings)
        resized += [
            resize(few, [height, width], InterpolationMode.BICUBIC, antialias=True)
            for few in decoded.split(max(1, _PIXELS_AT_ONCE // (size[0] * size[1])))
        ]
    frames = torch.cat(resized)
    if frames.device.type == "cpu" and torch.cuda.is_available():
        frames = frames.pin_memory()  # as SGLang does
    return frames, {
        "fps": fps,
        "duration": total / fps,
        "total_num_frames": total,
        "frames_indices": indices,
        "video_backend": "torchcodec",
    }
