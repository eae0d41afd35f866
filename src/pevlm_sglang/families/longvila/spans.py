"""LongVILA: one offset a frame, with the text that the processor writes around it.

A video is ``frame₀ ⏎ frame₁ ⏎ …``: every frame is 196 tokens (at 384 pixels; 256 at 448) and a
newline, which closes it and belongs to it. An image is a frame alone.
Source: ``processor.py`` beside this file, and there the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pevlm_sglang.errors import FrameSpanError
from pevlm_sglang.families.spans import item_ranges, joined
from pevlm_sglang.layout import FrameSpans, Range


def frames_per_step(hf_config: Any) -> int:
    """The tower takes each frame alone."""
    return 1


def video_spans(inputs: Any, ids: Sequence[int], frames_per_step: int) -> list[FrameSpans]:
    """See :class:`~pevlm_sglang.families.spans.SpanRules`."""
    videos = filter(lambda item: item.is_video(), inputs.mm_items)
    return joined(((item, _frames(item, ids)) for item in videos), frames_per_step)


def image_ranges(inputs: Any) -> list[Range]:
    """A range an image, from its first tile to the newline after its last."""
    images = [_frames(item, prompt_ids=()) for item in inputs.mm_items if item.is_image()]
    return [(tiles[0][0], tiles[-1][1]) for tiles in images]


def _frames(item: Any, prompt_ids: Sequence[int]) -> list[Range]:
    """The ranges of an item's frames, with the text around each, as the processor noted it."""
    texts = []
    for name in ("text_before", "text_after"):
        if (text := item.model_specific_data.get(name)) is None:
            raise FrameSpanError(f"{item.modality.name.lower()} item: expected {name}, got none")
        texts.append([int(token) for token in text])
    before, after = texts
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
