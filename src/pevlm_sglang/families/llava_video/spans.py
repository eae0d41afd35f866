"""LLaVA-Video (``LlavaQwenForCausalLM``): an item a video, one step a frame.

The reference pools the features of a frame 2×2 and adds newline tokens: one after each row of the
pooled grid (``mm_newline_position`` "grid", as in the published LLaVA-Video-7B-Qwen2: 14 rows of
15 tokens a frame), after each frame ("frame") or after the video ("one_token"). They belong to the
frame before them. Frames may also come as a list of images that are said to be of a video: an item
each, with text of the chat template between them.
Source: LLaVA-NeXT, ``prepare_inputs_labels_for_multimodal`` in llava/model/llava_arch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pevlm_sglang.errors import FrameSpanError
from pevlm_sglang.families.llava_video.sizes import TokenLayout
from pevlm_sglang.families.spans import image_ranges, item_ranges, runs
from pevlm_sglang.layout import FrameSpans, Range

__all__ = ["frames_per_step", "image_ranges", "video_spans"]

FRAMES = "pevlm_frames"
"""Of a video's item, beside its features: the number of its frames. An item that is one frame of a
list has none."""


def frames_per_step(hf_config: Any) -> int:
    """Sampled frames that the vision tower merges into one step.

    Raises:
        UnsupportedError: see :class:`~pevlm_sglang.families.llava_video.sizes.TokenLayout`.
    """
    TokenLayout.of(hf_config, patches=1)
    return 1


def video_spans(inputs: Any, ids: Sequence[int], frames_per_step: int) -> list[FrameSpans]:
    """The videos of a request: those that came whole, and the runs of frames that came as images.

    Raises:
        FrameSpanError: offsets and number of frames of an item do not fit together.
    """
    whole: list[FrameSpans] = []
    listed: list[Range] = []
    for item in inputs.mm_items:
        if not item.is_video():
            continue
        ranges = item_ranges(item)
        frames = item.model_specific_data.get(FRAMES)
        if frames is None:
            listed += ranges
        elif len(ranges) != 1:
            raise FrameSpanError(f"video item: expected one offset, got {len(ranges)}")
        else:
            whole.append(FrameSpans(_steps(*ranges[0], int(frames)), frames_per_step))
    return whole + runs(sorted(listed), whole)


def _steps(start: int, end: int, frames: int) -> tuple[Range, ...]:
    """Equal steps; the newline after a whole video is one token more of the last."""
    length = (end - start) // max(frames, 1)
    rest = (end - start) - length * frames
    if frames < 1 or length < 1 or rest > 1:
        raise FrameSpanError(
            f"video of {frames} frames: expected a number of tokens that splits into equal steps, "
            f"got {end - start}"
        )
    edges = [start + i * length for i in range(frames)] + [end]
    return tuple(pairwise(edges))
