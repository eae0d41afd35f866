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
from typing import Any

from pevlm_sglang.errors import FrameSpanError
from pevlm_sglang.families.llava_video.sizes import TokenLayout
from pevlm_sglang.families.spans import equal_steps, image_ranges, item_ranges, joined, runs
from pevlm_sglang.layout import FrameSpans, Range

__all__ = ["frames_per_step", "image_ranges", "video_spans"]

FRAMES = "pevlm_frames"
"""Of a clip's item, beside its features: the number of its frames. An item that is one frame of a
list has none."""

ENDS = "pevlm_ends"
"""Of a clip's item: whether its video ends with it."""


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
    clips: list[tuple[Any, Sequence[Range]]] = []
    listed: list[Range] = []
    for item in filter(lambda item: item.is_video(), inputs.mm_items):
        ranges = item_ranges(item)
        if (frames := item.model_specific_data.get(FRAMES)) is None:
            listed += ranges
        elif len(ranges) != 1:
            raise FrameSpanError(f"video item: expected one offset, got {len(ranges)}")
        else:  # one token more where a newline follows the video
            clips.append((item, equal_steps(ranges[0], int(frames), more=1)))
    whole = joined(clips, frames_per_step)
    return whole + runs(sorted(listed), whole)
