"""Qwen2.5-VL's vision tower attends within each step.

SGLang's full-attention layers attend over the whole video, where the reference attends within each
step: wrong features, at a cost quadratic in the length of the video
(sglang/srt/models/qwen2_5_vl.py, ``Qwen2_5_VisionTransformer.forward``).
"""

from __future__ import annotations

from typing import Any

import torch

from pevlm_sglang.seams import wrap


def install(architecture: str) -> None:
    """Correct the tower of a model. Runs in the scheduler.

    Raises:
        UnsupportedError: this SGLang lacks the seam.
    """
    if architecture != "Qwen2_5_VLForConditionalGeneration":
        return
    from sglang.srt.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    def per_step(forward: Any) -> Any:
        return lambda self, x, grid_thw: forward(self, x, split_into_steps(grid_thw))

    wrap(Qwen2_5_VisionTransformer, "forward", per_step, parameters=("x", "grid_thw"))


def split_into_steps(grid_thw: torch.Tensor) -> torch.Tensor:
    """``[n, 3]`` rows (T, H, W) → ``[sum(T), 3]`` rows (1, H, W).

    The tower builds its attention segments, windows and positions from rows of the grid; with a row
    a step, each comes out as in the reference (transformers' ``repeat_interleave(h * w, t)``).
    """
    steps = grid_thw.repeat_interleave(grid_thw[:, 0], dim=0)
    steps[:, 0] = 1
    return steps
