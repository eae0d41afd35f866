"""One door to the model families: multimodal inputs → FrameSpans, or a clear refusal."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pevlm_sglang.families import refused
from pevlm_sglang.layout import FrameSpans, Range
from pevlm_sglang.settings.refusals import UnsupportedError

IMAGE_RUN_GAP = 32
"""Neighbouring images at most this many tokens apart belong to one run."""


class FrameSpanError(ValueError):
    """The frames of a request cannot be told apart; the request is refused with this message."""


@dataclass(frozen=True)
class Prompt:
    """The expanded prompt of a request, for families whose processor writes text into a video.

    Attributes:
        ids: token ids; a placeholder's is its item's pad value, which no vocabulary holds.
        tokenizer: of the model; None where the server has none.
    """

    ids: Sequence[int]
    tokenizer: Any = None


class Family(Protocol):
    """What a module of ``pevlm_sglang.families`` offers."""

    ARCHITECTURES: tuple[str, ...]

    def frames_per_step(self, hf_config: Any) -> int:
        """Sampled frames that the vision tower merges into one step."""

    def video_spans(self, inputs: Any, prompt: Prompt, frames_per_step: int) -> list[FrameSpans]:
        """The videos of SGLang's ``MultimodalInputs``.

        Raises:
            FrameSpanError: the inputs do not say where the frames lie.
        """

    def image_ranges(self, inputs: Any) -> list[Range]:
        """A token range an image, for image runs."""


@dataclass(frozen=True)
class SpanRule:
    """How the frames of one model are found.

    Attributes:
        family: the module that knows the model's items.
        frames_per_step: sampled frames that the vision tower merges into one step.
    """

    family: Family
    frames_per_step: int

    @classmethod
    def of_model(cls, hf_config: Any) -> SpanRule:
        """The rule of the model with this Hugging Face configuration.

        Raises:
            UnsupportedError: no family knows the architecture; says why where that is known.
        """
        families = _families()
        architectures = tuple(hf_config.architectures or ())
        for family in families:
            if any(name in family.ARCHITECTURES for name in architectures):
                return cls(family, family.frames_per_step(hf_config))
        known = ", ".join(name for family in families for name in family.ARCHITECTURES)
        reasons = (refused.REASONS.get(name) for name in architectures)
        reason = next(filter(None, reasons), "it cannot tell where the frames of a video lie")
        raise UnsupportedError(
            f"model architecture {', '.join(architectures) or 'unknown'}: PEVLM does not serve it: "
            f"{reason}; supported: {known}"
        )

    def spans(self, inputs: Any, prompt: Prompt, *, image_runs: bool) -> list[FrameSpans]:
        """The videos of a request, and its image runs where they are wanted, in prompt order.

        Args:
            inputs: SGLang's ``MultimodalInputs``, positions absolute in the prompt.
            prompt: the tokens that they stand in.
            image_runs: whether neighbouring images count as a video.

        Raises:
            FrameSpanError: the inputs do not say where the frames lie.
        """
        videos = self.family.video_spans(inputs, prompt, self.frames_per_step)
        if image_runs:
            videos = videos + runs(sorted(self.family.image_ranges(inputs)), videos)
        return sorted(videos, key=lambda video: video.start)


def image_ranges(inputs: Any) -> list[Range]:
    """The token ranges of all images, from their offsets: what most families need.

    Raises:
        FrameSpanError: an image without offsets.
    """
    return [span for item in inputs.mm_items if item.is_image() for span in item_ranges(item)]


def item_ranges(item: Any) -> list[Range]:
    """An item's token ranges; SGLang's offsets are inclusive at the end.

    Raises:
        FrameSpanError: the item has no offsets.
    """
    if not item.offsets:
        raise FrameSpanError(f"{item.modality.name.lower()} item: expected offsets, got none")
    return [(int(start), int(end) + 1) for start, end in item.offsets]


def grid_rows(item: Any) -> list[list[int]]:
    """``video_grid_thw`` of an item: steps, patches in a column and in a row, a video.

    Raises:
        FrameSpanError: the item has none, or one of another shape.
    """
    grid = item.model_specific_data.get("video_grid_thw")
    if grid is None:
        raise FrameSpanError("video item: expected video_grid_thw, got none")
    rows = grid.tolist() if hasattr(grid, "tolist") else grid
    try:
        return [[int(t), int(h), int(w)] for t, h, w in rows]
    except (TypeError, ValueError):
        raise FrameSpanError(
            f"video_grid_thw: expected rows of three numbers, got {reprlib.repr(rows)}"
        ) from None


def runs(images: Sequence[Range], videos: Sequence[FrameSpans]) -> list[FrameSpans]:
    """Group images in prompt order; a video between two images ends the run."""
    groups: list[list[Range]] = []
    for image in images:
        if groups and _adjacent(groups[-1][-1], image, videos):
            groups[-1].append(image)
        else:
            groups.append([image])
    return [FrameSpans(tuple(group), image_run=True) for group in groups]


def _adjacent(left: Range, right: Range, videos: Sequence[FrameSpans]) -> bool:
    gap = right[0] - left[1]
    between = any(left[1] <= video.start < right[0] for video in videos)
    return gap <= IMAGE_RUN_GAP and not between


def _families() -> tuple[Family, ...]:
    from pevlm_sglang.families.internvl import spans as internvl
    from pevlm_sglang.families.llava_video import spans as llava_video
    from pevlm_sglang.families.longvila import spans as longvila
    from pevlm_sglang.families.qwen_vl import spans as qwen_vl
    from pevlm_sglang.families.qwen_vl import timestamps as qwen3_vl

    return (qwen_vl, qwen3_vl, internvl, llava_video, longvila)
