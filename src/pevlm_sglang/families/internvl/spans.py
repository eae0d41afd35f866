"""InternVL3.5: one offset a frame, in-item text around each.

The processor writes ``Frame1: <img>`` pads ``</img>`` and a newline for each frame. The label and
``<img>`` belong to the frame that they open, ``</img>`` and the newline to the frame that they
close, so the frames of a video tile it. A token belongs where its first character stands: one in
which the user's text runs on into a label is the user's, one that the closing newline opens is the
frame's (a question that starts with a newline merges with it). All tiles of a frame lie between one
``<img>`` and one ``</img>``: one step.
Source: sglang/srt/multimodal/processors/internvl.py, and ``processor.py`` beside this file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.families.spans import image_ranges, labelled_videos

__all__ = ["frames_per_step", "image_ranges", "video_spans"]

LANGUAGE_MODELS: tuple[str, ...] = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
"""Of the architecture's language models, those of InternVL3.5 that are tested here."""


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


CLOSING = 2  # </img>, and the token the newline opens

video_spans = partial(labelled_videos, closing=CLOSING)
