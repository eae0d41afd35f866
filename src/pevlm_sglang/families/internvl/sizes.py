"""Sampled frames and tokens of a video in InternVL3.5: a label, ``<img>``, the tokens of a tile,
``</img>`` and a newline for each frame.

Source: ``load_video`` and ``chat`` of the model card; ``processor.py`` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pevlm_sglang.families.frame_counts import FrameGeometry, FrameSettings
from pevlm_sglang.families.sizes import context_length, section, whole


def label(number: int) -> str:
    """The text before frame ``number``, counted from 1."""
    return f"Frame{number}: "


@dataclass(frozen=True)
class InternVLGeometry(FrameGeometry):
    """See the base."""

    model_type: str = "internvl_chat"
    context_length: int | None = 40_960
    num_frames: int = 32

    setting_names = ("num_frames", "max_frames")  # the reference knows no rate of frames

    @property
    def default_prompt_tokens(self) -> int:
        """Of SGLang's template internvl-2-5, with its Chinese system prompt: an estimate."""
        return 42

    def indices(self, total_frames: int, fps: float, settings: FrameSettings) -> list[int]:
        """The middle of each of ``num_frames`` equal segments; a short video repeats some."""
        segment = (total_frames - 1) / settings.num_frames
        return [int(segment / 2 + round(segment * i)) for i in range(settings.num_frames)]

    def text_tokens(self, number: int) -> int:
        """A label is ``Frame``, a token a digit, ``:`` and a space; ``<img>``, ``</img>`` and a
        newline follow."""
        return len(str(number)) + 5 + 1


PUBLISHED = {"internvl3_5": InternVLGeometry()}


def of_checkpoint(config: Mapping[str, Any], directory: Path) -> InternVLGeometry:
    """See :class:`~pevlm_sglang.families.sizes.SizeRules`."""
    vision, text = section(config, "vision_config"), section(config, "llm_config")
    ratio = config.get("downsample_ratio", 0.5)
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"downsample_ratio: expected a number from 0 to 1, got {ratio!r}")
    return InternVLGeometry(
        image_size=whole(config, "force_image_size", vision.get("image_size")),
        patch_size=whole(vision, "patch_size"),
        merge_size=round(1 / ratio),
        context_length=context_length(text),
    )
