"""Qwen3-VL and Qwen3-VL-MoE: one offset a step, and a timestamp before each.

The processor expands a video to ``<0.2 seconds><|vision_start|>pads<|vision_end|>``, step after
step. The timestamp belongs to the step that follows it and ``<|vision_end|>`` to the step before
it, so the steps tile the video. Timestamps differ in length, and so do steps. A second pair of
``<|vision_start|>`` and ``<|vision_end|>`` may stand around the video: the chat template wrote it,
transformers has kept it since 5.10, and it is outside the video.

The first timestamp is found in the text, from ``<|vision_start|>`` backwards. Where no special
token stands before it, one token may hold both the end of the user's text and the timestamp's
``<`` (``.<`` is a token of Qwen's). That token belongs to the text before the video.

Several videos may share one item: row i of ``video_grid_thw`` says how many of the offsets are
video i's. Source: sglang/srt/managers/mm_utils.py (``get_new_expanded_mm_items``) and
``Qwen3VLProcessor`` of transformers.
"""

from __future__ import annotations

import re
from typing import Any

from pevlm_sglang.families.spans import FrameSpanError, Prompt, grid_rows, image_ranges, item_ranges
from pevlm_sglang.layout import FrameSpans, Range

__all__ = ["ARCHITECTURES", "frames_per_step", "image_ranges", "video_spans"]

ARCHITECTURES: tuple[str, ...] = (
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)

_TIMESTAMP = re.compile(r"<\d+\.\d seconds>\Z")
_MAX_TIMESTAMP_TOKENS = 24  # as many as "<999999999999.9 seconds>" has characters
_FIRST_PLACEHOLDER = 1_000_000  # SGLang's MM_PAD_SHIFT_VALUE; no vocabulary reaches it


def frames_per_step(hf_config: Any) -> int:
    """Sampled frames that the vision tower merges into one step."""
    return int(hf_config.vision_config.temporal_patch_size)


def video_spans(inputs: Any, prompt: Prompt, frames_per_step: int) -> list[FrameSpans]:
    """The videos of a request, each with the timestamps in it.

    Raises:
        FrameSpanError: offsets, grid and text of an item do not fit together, or the server has
            no tokenizer to read the text with.
    """
    return [
        FrameSpans(tuple(_steps(ranges, inputs, prompt)), frames_per_step)
        for item in inputs.mm_items
        if item.is_video()
        for ranges in _videos(item)
    ]


def _videos(item: Any) -> list[list[Range]]:
    """The placeholders of each video of one VIDEO item, one range a step."""
    ranges = item_ranges(item)
    steps = [row[0] for row in grid_rows(item)]
    if min(steps, default=0) < 1 or sum(steps) != len(ranges):
        raise FrameSpanError(
            f"video item: expected one offset a step, for videos of {steps} steps in "
            f"video_grid_thw, got {len(ranges)}"
        )
    rest = iter(ranges)
    return [[next(rest) for _ in range(count)] for count in steps]


def _steps(ranges: list[Range], inputs: Any, prompt: Prompt) -> list[Range]:
    """The steps of a video, from the ranges of its placeholders."""
    if prompt.tokenizer is None:
        raise FrameSpanError(
            "tokenizer: expected one, with which a video's timestamps are found, got none; serve "
            "without --skip-tokenizer-init"
        )
    steps: list[Range] = []
    for first, end in ranges:
        _check_wrapper(first - 1, end, inputs, prompt)
        start = steps[-1][1] if steps else _timestamp_start(first - 1, prompt)
        text = _text(prompt, start, first - 1)
        if steps and not _TIMESTAMP.fullmatch(text):
            raise FrameSpanError(
                f"step {len(steps)} of a video: expected a timestamp, '<0.2 seconds>' say, between "
                f"it and the step before it, got {text[:80]!r}"
            )
        steps.append((start, end + 1))
    return steps


def _check_wrapper(vision_start: int, vision_end: int, inputs: Any, prompt: Prompt) -> None:
    """Both tokens have to stand around a step's placeholders."""
    for name, position, expected in (
        ("<|vision_start|>", vision_start, inputs.im_start_id),
        ("<|vision_end|>", vision_end, inputs.im_end_id),
    ):
        got = prompt.ids[position] if 0 <= position < len(prompt.ids) else None
        if got is None or got != expected:
            raise FrameSpanError(
                f"step of a video: expected {name} ({expected}) at position {position}, got {got}"
            )


def _timestamp_start(end: int, prompt: Prompt) -> int:
    """Position of the first token that holds nothing but a part of the timestamp before ``end``."""
    text = ""
    for start in range(end - 1, max(end - _MAX_TIMESTAMP_TOKENS, 0) - 1, -1):
        text = _text(prompt, start, end)
        if (timestamp := _TIMESTAMP.search(text)) is not None:
            return start if timestamp.start() == 0 else start + 1
    raise FrameSpanError(
        f"first step of a video: expected a timestamp, '<0.2 seconds>' say, before position {end}, "
        f"got {text!r}"
    )


def _text(prompt: Prompt, start: int, end: int) -> str:
    """The text of some tokens, with a replacement character for what is no text."""
    ids = [int(i) for i in prompt.ids[start:end]]
    if any(i >= _FIRST_PLACEHOLDER for i in ids):  # the tokenizer would skip it
        return "\N{REPLACEMENT CHARACTER}"
    text: str = prompt.tokenizer.decode(ids, skip_special_tokens=False)
    return text
