"""Where the frames of a request lie: multimodal items → FrameSpans, or a clear refusal."""

from __future__ import annotations

import math
import re
import reprlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from operator import index
from typing import Any, Protocol

from pevlm_sglang.errors import FrameSpanError
from pevlm_sglang.layout import FrameSpans, Range

IMAGE_RUN_GAP = 32
"""Neighbouring images at most this many tokens apart belong to one run."""

_LABELS = "pevlm_labels"
_CONTINUES = "pevlm_continues"
_MOST_LABEL_TOKENS = 24  # as many as "<999999999999.9 seconds>" has characters


class SpanRules(Protocol):
    """What a family's module ``spans`` offers."""

    def frames_per_step(self, hf_config: Any) -> int:
        """Sampled frames that the vision tower merges into one step.

        Raises:
            UnsupportedError: a model of the architecture that is not served.
        """

    def video_spans(
        self, inputs: Any, ids: Sequence[int], frames_per_step: int
    ) -> list[FrameSpans]:
        """The videos of SGLang's ``MultimodalInputs``.

        Args:
            ids: of the expanded prompt; a placeholder's is its item's pad value, which no
                vocabulary holds.

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

    family: SpanRules
    frames_per_step: int

    def spans(self, inputs: Any, ids: Sequence[int], *, image_runs: bool) -> list[FrameSpans]:
        """The videos of a request, and its image runs where they are wanted, in prompt order.

        Args:
            inputs: SGLang's ``MultimodalInputs``, positions absolute in the prompt.
            ids: see :meth:`SpanRules.video_spans`.
            image_runs: whether neighbouring images count as a video.

        Raises:
            FrameSpanError: the inputs do not say where the frames lie.
        """
        videos = self.family.video_spans(inputs, ids, self.frames_per_step)
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


def equal_steps(span: Range, steps: int, *, more: int = 0) -> tuple[Range, ...]:
    """The steps of a video, all of one length; the last has up to ``more`` tokens beyond it.

    Raises:
        FrameSpanError: the tokens do not split like that.
    """
    start, end = span
    length, rest = divmod(end - start, max(steps, 1))
    if steps < 1 or length < 1 or rest > more:
        raise FrameSpanError(
            f"video of {steps} steps: expected a number of tokens that splits into equal steps, "
            f"got {end - start}"
        )
    return tuple(pairwise([*(start + i * length for i in range(steps)), end]))


def mark_continuing(item: Any) -> None:
    """Leave word with a VIDEO item that it continues the video of the VIDEO item before it."""
    setattr(item, _CONTINUES, True)


def continues(item: Any) -> bool:
    """Whether an item is a clip that continues a video, see :func:`mark_continuing`."""
    return bool(item.model_specific_data.get(_CONTINUES))


def joined(clips: Iterable[tuple[Any, Sequence[Range]]], frames_per_step: int) -> list[FrameSpans]:
    """Videos of their clips.

    Args:
        clips: item and steps of each, in prompt order.

    Raises:
        FrameSpanError: a clip that continues nothing.
    """
    videos: list[list[Range]] = []
    for item, steps in clips:
        if not continues(item):
            videos.append([])
        if not videos:
            raise FrameSpanError("video item: expected the clip that it continues, got none")
        videos[-1] += steps
    return [FrameSpans(tuple(steps), frames_per_step) for steps in videos]


def leave_labels(item: Any, videos: Sequence[tuple[int, int]]) -> None:
    """Leave word with a VIDEO item of where its videos begin, in families that write a label
    before each step (``Frame1: ``, ``<0.2 seconds>``).

    Args:
        item: SGLang's ``MultimodalDataItem``; what it does not know travels to the scheduler.
        videos: a pair a video, in prompt order: its steps, and the tokens of its first label up to
            the opening token. Relative numbers, since a session may shift the item.
    """
    setattr(item, _LABELS, [list(video) for video in videos])


def label_tokens(tokenizer: Any, before: Sequence[int], label: str, what: str) -> int:
    """How many tokens at the end of ``before`` hold nothing but the first label of a video.

    A token in which other text runs on into the label is not among them: it is that text's.

    Args:
        before: the prompt up to the opening token of the first step.
        label: a regular expression, and ``what`` it stands for in words.

    Raises:
        ValueError: no label there (HTTP 400).
    """
    text = ""
    for count in range(1, min(_MOST_LABEL_TOKENS, len(before)) + 1):
        text = tokenizer.decode(before[-count:], clean_up_tokenization_spaces=False)
        if (found := re.search(rf"(?:{label})\Z", text)) is not None:
            return count if found.start() == 0 else count - 1
    raise ValueError(
        f"first step of a video: expected {what} before position {len(before)}, got {text!r}"
    )


def labelled_videos(
    inputs: Any, ids: Sequence[int], frames_per_step: int, *, closing: int
) -> list[FrameSpans]:
    """The videos of a family with an offset a step, a label and an opening token
    (``inputs.im_start_id``) before each and a closing one (``im_end_id``) after.

    A label belongs to the step that follows it, and what closes a step to that step, so the steps
    of a video tile it.

    Args:
        inputs, ids: see :meth:`SpanRules.video_spans`.
        closing: tokens after a step's placeholders that are its own, the closing one the first.

    Raises:
        FrameSpanError: an item that did not pass PEVLM's processor, or that the prompt contradicts.
    """

    def clips() -> Iterator[tuple[Any, list[Range]]]:
        for item in filter(lambda item: item.is_video(), inputs.mm_items):
            steps = item_ranges(item)
            labels = _labels(item, len(steps))
            pads = getattr(item, "pad_values", None) or (item.pad_value,)
            for step in steps:
                _check_wrapped(step, pads, inputs, ids, closing)
            rest = iter(steps)
            for count, label in labels:
                own = list(islice(rest, count))
                edges = [own[0][0] - 1 - label, *(end + closing for _, end in own)]
                yield item, list(pairwise(edges))

    return joined(clips(), frames_per_step)


def _labels(item: Any, steps: int) -> list[tuple[int, int]]:
    """What :func:`leave_labels` left with an item of so many steps."""
    try:
        found = [(index(n), index(label)) for n, label in item.model_specific_data.get(_LABELS)]
    except (TypeError, ValueError):
        found = [(0, 0)]
    if any(n < 1 or label < 0 for n, label in found):
        raise FrameSpanError(
            "video item: expected a video that this server sampled itself, got one that was "
            "processed before (processor_output, precomputed_embedding); send a video, or "
            "custom_params['pevlm']['enabled'] = false"
        )
    counts = [n for n, _ in found]
    if sum(counts) != steps:
        raise FrameSpanError(
            f"video item: expected one offset a step ({counts} steps), got {steps}"
        )
    return found


def _check_wrapped(
    step: Range, pads: Sequence[int], inputs: Any, ids: Sequence[int], closing: int
) -> None:
    """The stream must hold what the offset says: the opening token, the item's pads, the closing
    token, and as many after it as belong to the step."""
    start, end = step
    fits = 0 < start < end and end + closing - 1 < len(ids)
    if (
        not fits
        or (ids[start - 1], ids[end]) != (inputs.im_start_id, inputs.im_end_id)
        or ids[start] not in pads
        or ids[end - 1] not in pads
    ):
        around = [ids[i] if 0 <= i < len(ids) else None for i in (start - 1, start, end - 1, end)]
        raise FrameSpanError(
            f"video step at [{start}, {end}): expected the opening token {inputs.im_start_id}, its "
            f"own placeholders and the closing token {inputs.im_end_id} in the prompt of "
            f"{len(ids)} tokens, got {around} there"
        )


def runs(images: Sequence[Range], videos: Sequence[FrameSpans]) -> list[FrameSpans]:
    """Group images in prompt order; a video between two images ends the run."""
    groups: list[list[Range]] = []
    starts = sorted(video.start for video in videos)
    for image in images:
        end = groups[-1][-1][1] if groups else -math.inf
        between = bisect_left(starts, end) < bisect_left(starts, image[0])
        if image[0] - end > IMAGE_RUN_GAP or between:
            groups.append([])
        groups[-1].append(image)
    return [FrameSpans(tuple(group), image_run=True) for group in groups]
