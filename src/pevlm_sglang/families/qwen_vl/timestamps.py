"""Qwen3-VL and Qwen3-VL-MoE: one offset a step, and a timestamp before each.

The processor expands a video to ``<0.2 seconds><|vision_start|>pads<|vision_end|>``, step after
step. The timestamp belongs to the step that follows it and ``<|vision_end|>`` to the step before
it, so the steps tile the video. Timestamps differ in length, and so do steps. A second pair of
``<|vision_start|>`` and ``<|vision_end|>`` may stand around the video: the chat template wrote it,
transformers has kept it since 5.10, and it is outside the video.

Where no special token stands before the first timestamp, one token may hold both the end of the
user's text and the timestamp's ``<`` (``.<`` is a token of Qwen's). That token belongs to the text
before the video.

A clip has an item of its own. Source: sglang/srt/managers/mm_utils.py
(``get_new_expanded_mm_items``) and ``Qwen3VLProcessor`` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from pevlm_sglang.families.qwen_vl.spans import frames_per_step
from pevlm_sglang.families.spans import (
    continues,
    grid_rows,
    image_ranges,
    item_ranges,
    label_tokens,
    labelled_videos,
    leave_labels,
)
from pevlm_sglang.layout import Range

__all__ = ["frames_per_step", "image_ranges", "label_items", "video_spans"]

_TIMESTAMP, _WHAT = r"<\d+\.\d seconds>", "a timestamp, '<0.2 seconds>' say,"

CLOSING = 1  # <|vision_end|>

video_spans = partial(labelled_videos, closing=CLOSING)


def label_items(items: Iterable[Any], ids: Sequence[int], tokenizer: Any) -> None:
    """Leave the steps of each video with its item; in the launcher, where the text is at hand.

    Args:
        items: SGLang's ``MultimodalDataItem`` of a request.
        ids: of the expanded prompt, with the tokenizer's own placeholders.

    Raises:
        ValueError: offsets, grid and text of an item do not fit together (HTTP 400).
    """
    videos: list[list[tuple[Any, list[Range]]]] = []
    for item in filter(lambda item: item.is_video(), items):
        ranges = item_ranges(item)
        steps = [row[0] for row in grid_rows(item)]
        if min(steps, default=0) < 1 or steps != [len(ranges)]:
            raise ValueError(
                f"video item: expected one offset a step, for a video of {steps} steps in "
                f"video_grid_thw, got {len(ranges)}"
            )
        if not continues(item):
            videos.append([])
        videos[-1].append((item, ranges))
    for clips in videos:
        label = _label([step for _, own in clips for step in own], ids, tokenizer)
        end = None
        for item, own in clips:
            tokens = label if end is None else own[0][0] - 1 - (end + CLOSING)
            leave_labels(item, [(len(own), tokens)])
            end = own[-1][1]


def _label(steps: list[Range], ids: Sequence[int], tokenizer: Any) -> int:
    """Tokens of a video's first timestamp, from the ranges of its placeholders."""
    between = [i for (_, end), (start, _) in pairwise(steps) for i in ids[end + 1 : start - 1]]
    text = tokenizer.decode(between, skip_special_tokens=False)  # of all steps but the first
    if not re.fullmatch(f"(?:{_TIMESTAMP}){{{len(steps) - 1}}}", text):
        raise ValueError(
            f"video of {len(steps)} steps: expected {_WHAT} between a step and the one before it, "
            f"got {text[:80]!r}"
        )
    return label_tokens(tokenizer, ids[: steps[0][0] - 1], _TIMESTAMP, _WHAT)
