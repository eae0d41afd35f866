"""LongVILA: one offset a frame, with the text that the processor writes around it.

A video is ``frame₀ ⏎ frame₁ ⏎ …``: every frame is 196 tokens (at 384 pixels; 256 at 448) and a
newline, which closes it and belongs to it. An image is a frame alone.
Source: :mod:`pevlm_sglang.families.longvila.processor`, and there the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pevlm_sglang.families.spans import FrameSpanError, Prompt, item_ranges
from pevlm_sglang.layout import FrameSpans, Range

ARCHITECTURES: tuple[str, ...] = ("LlavaLlamaModel",)

DEFAULT_NUM_FRAMES = 256  # of LongVILA-7B-256f, where config.json does not say

DOWNSAMPLE = {
    "mlp_downsample": 2,
    "mlp_downsample_fix": 2,  # the name in longvila/train/5_long_sft_256frames.sh
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}
"""Projector type → patches a side that become one token."""


def frames_at_rate(total: int, video_fps: float, fps: float, most: int) -> int:
    """How many frames of a video are sampled at a rate: two at least, and no more than it has."""
    return min(max(int(total / video_fps * fps), 2), most, total)


def frames_per_step(hf_config: Any) -> int:
    """The tower takes each frame alone."""
    return 1


def video_spans(inputs: Any, prompt: Prompt, frames_per_step: int) -> list[FrameSpans]:
    """The videos of a request.

    Raises:
        FrameSpanError: a video item without offsets, or one that the prompt's tokens contradict.
    """
    return [
        FrameSpans(tuple(_frames(item, prompt.ids)), frames_per_step)
        for item in inputs.mm_items
        if item.is_video()
    ]


def image_ranges(inputs: Any) -> list[Range]:
    """A range an image, from its first tile to the newline after its last."""
    images = [_frames(item, prompt_ids=()) for item in inputs.mm_items if item.is_image()]
    return [(tiles[0][0], tiles[-1][1]) for tiles in images]


def _frames(item: Any, prompt_ids: Sequence[int]) -> list[Range]:
    """The ranges of an item's frames, with the text around each."""
    before, after = (_frame_text(item, name) for name in ("text_before", "text_after"))
    frames = []
    for start, end in item_ranges(item):
        for position, text in ((start - len(before), before), (end, after)):
            found = list(prompt_ids[position : position + len(text)])
            if prompt_ids and found != text:
                raise FrameSpanError(
                    f"video item: expected tokens {text} beside the frame [{start}, {end}), "
                    f"got {found}"
                )
        frames.append((start - len(before), end + len(after)))
    return frames


def _frame_text(item: Any, name: str) -> list[int]:
    """Token ids that stand before or after each frame, as the processor noted them."""
    text = item.model_specific_data.get(name)
    if text is None:
        raise FrameSpanError(f"{item.modality.name.lower()} item: expected {name}, got none")
    return [int(token) for token in text]
