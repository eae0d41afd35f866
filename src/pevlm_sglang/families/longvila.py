"""LongVILA: one offset a frame, with the text that the processor writes around it.

A video is ``frame₀ ⏎ frame₁ ⏎ …``: every frame is 196 tokens (at 384 pixels; 256 at 448) and a
newline, which closes it and belongs to it. An image is a frame alone.
Source: :mod:`pevlm_sglang.processors.longvila`, and there the reference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pevlm_sglang.frames import FrameSpanError, Prompt, item_ranges
from pevlm_sglang.layout import FrameSpans, Range

ARCHITECTURES: tuple[str, ...] = ("LlavaLlamaModel",)

CHAT_TEMPLATE_TOKENS = (14, 5)
"""Tokens of Qwen2's chat template around the user's text, its default system prompt among them."""


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


@dataclass(frozen=True)
class VideoKnobs:
    """The keys of ``--mm-process-config '{"video": {...}}'`` that take effect.

    Attributes:
        num_frames: frames sampled from any video, evenly from its first to its last; frames repeat
            where it has fewer, as in the reference.
        fps: frames sampled from a second of video, in place of that; where they are more than
            ``num_frames``, these are sampled evenly.
        max_frames: most frames that a request may ask for.

    Raises:
        ValueError: a value of the wrong type, or not positive, or more frames than the most.
    """

    num_frames: int
    fps: float | None = None
    max_frames: int = 768

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "fps" and value is None:
                continue
            kind: Any = (int, float) if name == "fps" else int
            ok = isinstance(value, kind) and not isinstance(value, bool)
            if not ok or not 0 < value < math.inf:
                expected = "a number" if name == "fps" else "a whole number"
                raise ValueError(f"{name}: expected {expected} of more than 0, got {value!r}")
        if self.num_frames > self.max_frames:
            raise ValueError(
                f"num_frames: expected at most max_frames ({self.max_frames}), "
                f"got {self.num_frames}"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any], published: int) -> VideoKnobs:
        """The knobs in the ``video`` section of the server's flag.

        Args:
            values: of the section.
            published: ``num_video_frames`` of the checkpoint.

        Raises:
            ValueError: a name that is not one of a knob, or a bad value.
        """
        names = [knob.name for knob in dataclasses.fields(cls)]
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"video knob {unknown[0]}: expected one of {', '.join(names)}")
        return cls(**{"num_frames": published, **values})
