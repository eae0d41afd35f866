"""Whether SGLang's own sampling and resizing of a video are the reference's by now.

Asked of a small made video at start: in the release in which they are, a server no longer says that
PEVLM corrects them (:mod:`pevlm_sglang.families.qwen_vl`).
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from sglang.srt.multimodal.processors import qwen_vl as upstream
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.families.qwen_vl.sizes import QwenGeometry
from pevlm_sglang.families.qwen_vl.video import resized, sample

_FRAMES, _RATE, _SIZE = 37, 9.5, (180, 322)


class _Probe(VideoDecoderWrapper):
    """Noise, in which each frame and each pixel differs from its neighbours."""

    avg_fps = _RATE
    frame_shape = _SIZE

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._frames = torch.randint(
            0, 256, (_FRAMES, *_SIZE, 3), dtype=torch.uint8, generator=generator
        )

    def __len__(self) -> int:
        return _FRAMES

    def __del__(self) -> None: ...

    def get_frames_as_tensor(self, indices: list[int]) -> torch.Tensor:
        return self._frames[indices]


@cache
def is_the_references(geometry: QwenGeometry) -> bool:
    """Whether SGLang samples and resizes as qwen-vl-utils does."""
    probe, settings = _Probe(), geometry.settings({})
    options: dict[str, Any] = {"video_config": settings.given()}
    if "image_factor" in inspect.signature(upstream.preprocess_video).parameters:
        options["image_factor"] = geometry.factor
    try:  # a loop may be running, and nothing is awaited in there
        upstream.preprocess_video(probe, **options).send(None)
    except StopIteration as done:
        theirs, metadata = done.value
    else:
        return False
    expected = sample(probe, geometry, settings)
    frames = resized(probe.get_frames_as_tensor(expected.indices), expected.size, exact=True)
    same = list(metadata["frames_indices"]) == expected.indices
    return same and theirs.shape == frames.shape and bool((theirs.cpu() == frames.cpu()).all())
