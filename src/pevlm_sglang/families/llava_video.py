"""LLaVA-Video (``LlavaQwenForCausalLM``): an item a video, one step a frame.

The reference pools the features of a frame 2×2 and adds newline tokens: one after each row of the
pooled grid (``mm_newline_position`` "grid", as in the published LLaVA-Video-7B-Qwen2: 14 rows of
15 tokens a frame), after each frame ("frame") or after the video ("one_token"). They belong to the
frame before them. Frames may also come as a list of images that are said to be of a video: an item
each, with text of the chat template between them.
Source: LLaVA-NeXT, ``prepare_inputs_labels_for_multimodal`` in llava/model/llava_arch.py, and
``load_video`` in docs/LLaVA_Video_1003.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from pevlm_sglang.frames import FrameSpanError, Prompt, item_ranges, runs
from pevlm_sglang.layout import FrameSpans, Range
from pevlm_sglang.support import UnsupportedError

ARCHITECTURES: tuple[str, ...] = ("LlavaQwenForCausalLM",)

FRAMES = "pevlm_frames"
"""Of a video's item, beside its features: the number of its frames. An item that is one frame of a
list has none."""

POOL_STRIDE = 2  # of the reference, whatever a configuration says
_POOLED_SIDE = {"bilinear": math.ceil, "average": math.floor, "max": math.floor}
_NEWLINES = ("grid", "frame", "one_token", "no_token")


@dataclass(frozen=True)
class TokenLayout:
    """How many tokens the frames of a video become, and where the newlines are.

    Attributes:
        patches: features a side of a frame, before pooling.
        pool_mode: ``bilinear``, ``average`` or ``max``; the first rounds an odd side up, the others
            down.
        newline: ``grid`` (after each row), ``frame``, ``one_token`` (after the video) or
            ``no_token``.

    Raises:
        UnsupportedError: another pooling or position of newlines.
    """

    patches: int
    pool_mode: str = "bilinear"
    newline: str = "grid"

    def __post_init__(self) -> None:
        _expect("mm_spatial_pool_mode", self.pool_mode, tuple(_POOLED_SIDE))
        _expect("mm_newline_position", self.newline, _NEWLINES)

    @classmethod
    def of(cls, hf_config: Any, patches: int) -> TokenLayout:
        """The layout of the model with this configuration; defaults are the reference's.

        Raises:
            UnsupportedError: a layout that is not known here.
        """
        merge_type = getattr(hf_config, "mm_patch_merge_type", "flat")
        _expect("mm_patch_merge_type", merge_type, ("spatial_unpad",))
        _expect("add_faster_video", bool(getattr(hf_config, "add_faster_video", False)), (False,))
        return cls(
            patches,
            getattr(hf_config, "mm_spatial_pool_mode", "bilinear"),
            getattr(hf_config, "mm_newline_position", "one_token"),
        )

    @property
    def side(self) -> int:
        """Features a side of a pooled frame."""
        return int(_POOLED_SIDE[self.pool_mode](self.patches / POOL_STRIDE))

    @property
    def tokens_per_frame(self) -> int:
        return self.side * (self.side + (self.newline == "grid")) + (self.newline == "frame")

    def tokens(self, frames: int) -> int:
        """Tokens of a video."""
        return frames * self.tokens_per_frame + (self.newline == "one_token")


def _expect(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        expected = " or ".join(str(choice) for choice in allowed)
        raise UnsupportedError(
            f"{name} of the model's configuration: expected {expected}, got {value}; PEVLM does "
            "not know how the frames of such a model are laid out"
        )


def frames_per_step(hf_config: Any) -> int:
    """Sampled frames that the vision tower merges into one step.

    Raises:
        UnsupportedError: see :class:`TokenLayout`.
    """
    TokenLayout.of(hf_config, patches=1)
    return 1


def video_spans(inputs: Any, prompt: Prompt, frames_per_step: int) -> list[FrameSpans]:
    """The videos of a request: those that came whole, and the runs of frames that came as images.

    Raises:
        FrameSpanError: offsets and number of frames of an item do not fit together.
    """
    whole: list[FrameSpans] = []
    listed: list[Range] = []
    for item, ranges in _ranges(inputs, "VIDEO"):
        frames = item.model_specific_data.get(FRAMES)
        if frames is None:
            listed += ranges
        elif len(ranges) != 1:
            raise FrameSpanError(f"video item: expected one offset, got {len(ranges)}")
        else:
            whole.append(FrameSpans(_steps(*ranges[0], int(frames)), frames_per_step))
    return whole + runs(sorted(listed), whole)


def image_ranges(inputs: Any) -> list[Range]:
    """The token ranges of all images.

    Raises:
        FrameSpanError: an image without a place in the prompt.
    """
    return [span for _, ranges in _ranges(inputs, "IMAGE") for span in ranges]


def _ranges(inputs: Any, modality: str) -> list[tuple[Any, list[Range]]]:
    """Each item of a modality with its token ranges.

    SGLang's own model (``--pevlm-vision-fixes false``) leaves an item's offsets empty, and puts the
    place of its items beside them (``pad_input_ids`` in sglang/srt/models/llava.py).
    """
    items = inputs.mm_items
    starts = getattr(inputs, "image_offsets", None)
    if starts and not any(item.offsets for item in items):
        lengths = inputs.image_pad_len
        if not len(starts) == len(lengths) == len(items):
            raise FrameSpanError(
                f"image_offsets: expected one an item ({len(items)}), got {len(starts)}"
            )
        placed = [
            (item, [(int(start), int(start + length))])
            for item, start, length in zip(items, starts, lengths, strict=True)
        ]
        return [(item, ranges) for item, ranges in placed if item.modality.name == modality]
    return [(item, item_ranges(item)) for item in items if item.modality.name == modality]


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

    num_frames: int = 64
    fps: float | None = None
    max_frames: int = 768

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind: Any = (int, float) if name == "fps" else int
            if name == "fps" and value is None:
                continue
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
    def of(cls, values: Mapping[str, Any]) -> VideoKnobs:
        """The knobs in the ``video`` section of the server's flag.

        Raises:
            ValueError: a name that is not one of a knob, or a bad value.
        """
        names = [knob.name for knob in fields(cls)]
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"video knob {unknown[0]}: expected one of {', '.join(names)}")
        return cls(**values)

    def limits(self) -> dict[str, float]:
        """What a request may ask for, at most."""
        return {"fps": math.inf, "max_frames": self.max_frames}


def sampled_frames(
    total_frames: int, video_fps: float, frames: int, fps: float | None
) -> list[int]:
    """The indices of the frames that the reference samples.

    Args:
        total_frames: in the file.
        video_fps: of the file.
        frames: how many; with ``fps``, how many at most.
        fps: frames from a second of video; None = ``frames``, evenly spread.

    Source: ``load_video``, with ``force_sample`` where ``fps`` is None.
    """
    import numpy as np

    if fps is not None:
        # The reference has no answer to an fps of more than twice the video's own; it is all here.
        indices = list(range(0, total_frames, max(1, round(video_fps / fps))))
        if len(indices) <= frames:
            return indices
    even: list[int] = np.linspace(0, total_frames - 1, frames, dtype=int).tolist()
    return even
