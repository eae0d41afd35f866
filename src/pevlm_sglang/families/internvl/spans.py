"""InternVL3.5: one offset a frame, in-item text around each.

The processor writes ``Frame1: <img>`` pads ``</img>`` and a newline for each frame. The label and
``<img>`` belong to the frame that they open, ``</img>`` and the newline to the frame that they
close, so the frames of a video tile it. A token belongs where its first character stands: one in
which the user's text runs on into a label is the user's, one that the closing newline opens is the
frame's (a question that starts with a newline merges with it). All tiles of a frame lie between one
``<img>`` and one ``</img>``: one step.

An item may hold several videos, one after the other; where each begins, PEVLM's processor says
(:func:`mark`), because their numbers of frames may differ.
Source: sglang/srt/multimodal/processors/internvl.py, and :mod:`pevlm_sglang.families.internvl.processor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pevlm_sglang.families.spans import FrameSpanError, Prompt, image_ranges, item_ranges
from pevlm_sglang.layout import FrameSpans, Range
from pevlm_sglang.settings.refusals import UnsupportedError

__all__ = ["ARCHITECTURES", "frames_per_step", "image_ranges", "mark", "video_spans"]

ARCHITECTURES: tuple[str, ...] = ("InternVLChatModel",)

LANGUAGE_MODELS: tuple[str, ...] = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
"""Of the architecture's language models, those of InternVL3.5 that are tested here."""

DEFAULT_NUM_FRAMES = 32
KNOBS = ("num_frames", "max_frames")
"""Of a server's videos; see :class:`pevlm_sglang.families.frame_settings.FrameKnobs`."""

_MARK = "pevlm_videos"
_CLOSING = 2  # tokens after a frame's pads: </img>, and the one that the newline opens


def frames_per_step(hf_config: Any) -> int:
    """Every frame is a step.

    Raises:
        UnsupportedError: a language model that PEVLM was not tested with.
    """
    names = tuple(hf_config.llm_config.architectures or ())
    if not any(name in LANGUAGE_MODELS for name in names):
        raise UnsupportedError(
            f"InternVLChatModel: expected a language model of {', '.join(LANGUAGE_MODELS)} "
            f"(InternVL3.5), got {', '.join(names) or 'none'}"
        )
    return 1


def mark(item: Any, videos: Sequence[tuple[int, int]]) -> None:
    """Leave word with a VIDEO item of where its videos begin.

    Args:
        item: SGLang's ``MultimodalDataItem``; what it does not know travels to the scheduler.
        videos: a pair a video, in prompt order: its frames, and the tokens of its first label
            before ``<img>``. Relative numbers, since a session may shift the item.
    """
    setattr(item, _MARK, [list(video) for video in videos])


def video_spans(inputs: Any, prompt: Prompt, frames_per_step: int) -> list[FrameSpans]:
    """The videos of a request.

    Raises:
        FrameSpanError: an item without PEVLM's mark, or offsets that do not fit it or the prompt.
    """
    return [
        FrameSpans(tuple(steps), frames_per_step)
        for item in inputs.mm_items
        if item.is_video()
        for steps in _videos(item, inputs, prompt.ids)
    ]


def _is_mark(mark: Any) -> bool:
    return isinstance(mark, list | tuple) and [type(part) for part in mark] == [int, int]


def _videos(item: Any, inputs: Any, ids: Sequence[int]) -> list[list[Range]]:
    """The steps of each video of one item."""
    frames = item_ranges(item)
    marks = item.model_specific_data.get(_MARK)
    if not isinstance(marks, list) or not all(map(_is_mark, marks)):
        raise FrameSpanError(
            "video item: expected a video that this server sampled itself, got one that was "
            "processed before (processor_output, precomputed_embedding); send a video, or "
            "custom_params['pevlm']['enabled'] = false"
        )
    if sum(count for count, _ in marks) != len(frames):
        raise FrameSpanError(
            f"video item: expected one offset a frame ({[count for count, _ in marks]} frames), "
            f"got {len(frames)}"
        )
    for frame in frames:
        _check_wrapped(frame, item, inputs, ids)
    videos, at = [], 0
    for count, label_tokens in marks:
        start = frames[at][0] - 1 - label_tokens
        ends = [end + _CLOSING for _, end in frames[at : at + count]]
        videos.append(list(zip([start, *ends[:-1]], ends, strict=True)))
        at += count
    return videos


def _check_wrapped(frame: Range, item: Any, inputs: Any, ids: Sequence[int]) -> None:
    """The stream must hold what the offset says: ``<img>``, the item's pads, ``</img>``, and a
    token after it."""
    start, end = frame
    pads = getattr(item, "pad_values", None) or (item.pad_value,)
    fits = 0 < start < end and end + 1 < len(ids)
    if (
        not fits
        or (ids[start - 1], ids[end]) != (inputs.im_start_id, inputs.im_end_id)
        or not {ids[start], ids[end - 1]} <= set(pads)
    ):
        raise FrameSpanError(
            f"video frame at [{start}, {end}): expected <img>, its own placeholders, </img> and a "
            f"newline in the prompt of {len(ids)} tokens, got something else there"
        )
