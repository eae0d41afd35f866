"""Qwen2-VL and Qwen2.5-VL: one offset a video, split into equal steps.

The chat template writes ``<|vision_start|>`` and ``<|vision_end|>`` around a video, and the
processor expands one pad between them to ``T × H × W / merge²`` tokens, step after step. Several
videos may share one item: offset i belongs to row i of ``video_grid_thw``.
Source: sglang/srt/multimodal/processors/qwen_vl.py.
What a video becomes before that, sampled frames and their sizes, is said in ``sizes.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pevlm_sglang.errors import FrameSpanError
from pevlm_sglang.families.spans import (
    equal_steps,
    grid_rows,
    image_ranges,
    item_ranges,
    joined,
)
from pevlm_sglang.layout import FrameSpans, Range

__all__ = ["frames_per_step", "image_ranges", "video_spans"]


def frames_per_step(hf_config: Any) -> int:
    """Sampled frames that the vision tower merges into one step."""
    return int(hf_config.vision_config.temporal_patch_size)


def video_spans(inputs: Any, ids: Sequence[int], frames_per_step: int) -> list[FrameSpans]:
    """See :class:`~pevlm_sglang.families.spans.SpanRules`."""
    return joined(_clips(inputs), frames_per_step)


def _clips(inputs: Any) -> Iterator[tuple[Any, tuple[Range, ...]]]:
    for item in filter(lambda item: item.is_video(), inputs.mm_items):
        ranges, rows = item_ranges(item), grid_rows(item)
        if len(rows) != len(ranges):
            raise FrameSpanError(
                f"video item: expected one offset a video ({len(rows)} in video_grid_thw), "
                f"got {len(ranges)}"
            )
        for span, (steps, _, _) in zip(ranges, rows, strict=True):
            yield item, equal_steps(span, steps)
