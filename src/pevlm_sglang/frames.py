"""One door to the model families: a request's multimodal items → FrameSpans, or a clear refusal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pevlm_sglang.layout import FrameSpans, Range
from pevlm_sglang.support import UnsupportedError

IMAGE_RUN_GAP = 32
"""Neighbouring images at most this many tokens apart belong to one run."""


class FrameSpanError(ValueError):
    """The frames of a request cannot be told apart; the request is refused with this message."""


@dataclass(frozen=True)
class SpanRule:
    """How the frames of one model are found.

    Attributes:
        family: the module that knows the model's items.
        frames_per_step: sampled frames that the vision tower merges into one step.
    """

    family: ModuleType
    frames_per_step: int

    @classmethod
    def of_model(cls, hf_config: Any) -> SpanRule:
        """The rule of the model with this Hugging Face configuration.

        Raises:
            UnsupportedError: no family knows the architecture.
        """
        families = _families()
        architectures = tuple(hf_config.architectures or ())
        for family in families:
            if any(name in family.ARCHITECTURES for name in architectures):
                return cls(family, family.frames_per_step(hf_config))
        known = ", ".join(name for family in families for name in family.ARCHITECTURES)
        raise UnsupportedError(
            f"model architecture {', '.join(architectures) or 'unknown'}: PEVLM cannot tell its "
            f"frames apart; supported: {known}"
        )

    def spans(self, items: Iterable[Any], *, image_runs: bool) -> list[FrameSpans]:
        """The videos of a request, and its image runs where they are wanted, in prompt order.

        Args:
            items: SGLang's ``MultimodalDataItem`` objects, positions absolute in the prompt.
            image_runs: whether neighbouring images count as a video.

        Raises:
            FrameSpanError: the items do not say where the frames lie.
        """
        videos: list[FrameSpans] = []
        images: list[Range] = []
        for item in items:
            if item.is_video():
                videos += self.family.video_spans(item, self.frames_per_step)
            elif image_runs and item.is_image():
                images += item_ranges(item)
        videos += _runs(sorted(images), videos)
        return sorted(videos, key=lambda video: video.start)


def item_ranges(item: Any) -> list[Range]:
    """An item's token ranges; SGLang's offsets are inclusive at the end.

    Raises:
        FrameSpanError: the item has no offsets.
    """
    if not item.offsets:
        raise FrameSpanError(f"{item.modality.name.lower()} item: expected offsets, got none")
    return [(int(start), int(end) + 1) for start, end in item.offsets]


def _runs(images: Sequence[Range], videos: Sequence[FrameSpans]) -> list[FrameSpans]:
    """Group images in prompt order; a video between two images ends the run."""
    runs: list[list[Range]] = []
    for image in images:
        if runs and _adjacent(runs[-1][-1], image, videos):
            runs[-1].append(image)
        else:
            runs.append([image])
    return [FrameSpans(tuple(run), image_run=True) for run in runs]


def _adjacent(left: Range, right: Range, videos: Sequence[FrameSpans]) -> bool:
    gap = right[0] - left[1]
    between = any(left[1] <= video.start < right[0] for video in videos)
    return gap <= IMAGE_RUN_GAP and not between


def _families() -> tuple[ModuleType, ...]:
    from pevlm_sglang.families import qwen_vl

    return (qwen_vl,)
