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

DEFAULT_NUM_FRAMES = 32
SETTINGS: tuple[str, ...] = ("num_frames", "max_frames")  # the reference knows no rate of frames
WISHES: tuple[str, ...] = ("max_frames",)


@dataclass(frozen=True)
class InternVLGeometry(FrameGeometry):
    """See the base."""

    num_frames: int = DEFAULT_NUM_FRAMES
    context_length: int | None = 40_960
    model_type: str = "internvl_chat"
    # SGLang's template internvl-2-5, with its Chinese system prompt: an estimate.
    default_prompt_tokens: int = 42

    def settings(self, values: Mapping[str, Any]) -> FrameSettings:
        return settings_of(values)

    def text_tokens(self, number: int) -> int:
        """A label is ``Frame``, a token a digit, ``:`` and a space; ``<img>``, ``</img>`` and a
        newline follow."""
        return len(str(number)) + 5 + 1


def settings_of(values: Mapping[str, Any]) -> FrameSettings:
    """See :meth:`FrameSettings.of`."""
    return FrameSettings.of(values, default=DEFAULT_NUM_FRAMES, names=SETTINGS)


PUBLISHED = {"internvl3_5": InternVLGeometry()}


def of_checkpoint(config: Mapping[str, Any], directory: Path) -> InternVLGeometry:
    """See :class:`~pevlm_sglang.families.sizes.SizeRules`."""
    vision, text = config["vision_config"], config["llm_config"]
    return InternVLGeometry(
        image_size=int(config.get("force_image_size") or vision["image_size"]),
        patch_size=int(vision["patch_size"]),
        merge_size=round(1 / config.get("downsample_ratio", 0.5)),
        context_length=text.get("max_position_embeddings"),
    )
