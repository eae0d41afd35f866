"""Qwen2-VL and Qwen2.5-VL: one offset a video, split into equal steps.

The chat template writes ``<|vision_start|>`` and ``<|vision_end|>`` around a video, and the
processor expands one pad between them to ``T × H × W / merge²`` tokens, step after step. Several
videos may share one item: offset i belongs to row i of ``video_grid_thw``.
Source: sglang/srt/multimodal/processors/qwen_vl.py.
What a video becomes before that, sampled frames and their sizes, is said in ``sizes.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pevlm_sglang.errors import FrameSpanError
from pevlm_sglang.families.spans import grid_rows, image_ranges, item_ranges
from pevlm_sglang.layout import FrameSpans

__all__ = ["frames_per_step", "image_ranges", "video_spans"]


def frames_per_step(hf_config: Any) -> int:
    """Sampled frames that the vision tower merges into one step."""
    return int(hf_config.vision_config.temporal_patch_size)


def video_spans(inputs: Any, ids: Sequence[int], frames_per_step: int) -> list[FrameSpans]:
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
    rows = grid_rows(item)
    if len(rows) != len(ranges):
        raise FrameSpanError(
            f"video item: expected one offset a video ({len(rows)} in video_grid_thw), "
            f"got {len(ranges)}"
        )
    return [
        FrameSpans(tuple(_equal_steps(start, end, row[0])), frames_per_step)
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
