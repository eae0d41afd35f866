"""Sampled frames and tokens of a video in LongVILA: the tokens of a frame, and a newline.

Source: ``llava/utils/media.py`` and ``llava/mm_utils.py`` of github.com/NVlabs/VILA;
``processor.py`` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pevlm_sglang.families.frame_counts import FrameGeometry, FrameSettings, evenly
from pevlm_sglang.families.sizes import context_length, read_json, whole

DEFAULT_NUM_FRAMES = 256  # of LongVILA-7B-256f, where config.json does not say

DOWNSAMPLE = {
    "mlp_downsample": 2,
    "mlp_downsample_fix": 2,  # the name in longvila/train/5_long_sft_256frames.sh
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}
"""Projector type → patches a side that become one token."""


@dataclass(frozen=True)
class LongVilaGeometry(FrameGeometry):
    """See the base."""

    model_type: str = "llava_llama"
    context_length: int | None = 131_072
    num_frames: int = DEFAULT_NUM_FRAMES

    def indices(self, total_frames: int, fps: float, settings: FrameSettings) -> list[int]:
        """``num_frames`` evenly, the last one among them; frames of a shorter video repeat.

        A rate gets the rule of the training loader (``get_frame_from_vcap_with_fps``): that rate,
        or fewer frames over the whole video where that would be too many, but two at least where it
        has them. At inference the reference takes the first of them and drops the rest of the
        video, which nobody can mean.
        """
        count = settings.num_frames
        if settings.fps is None:
            return [round(position) for position in evenly(total_frames, count)]
        count = min(max(int(total_frames / fps * settings.fps), 2), count, total_frames)
        return [int(position) for position in evenly(total_frames, count)]


PUBLISHED = {"longvila": LongVilaGeometry()}
"""LongVILA-7B-256f's files were not at hand: its frames of 448 pixels are those of its training
script (longvila/train/5_long_sft_256frames.sh) and fit the PEVLM paper's "approximately 4k tokens"
for 16 of them; its context is what 256 frames need, to a power of two."""


def of_checkpoint(config: Mapping[str, Any], directory: Path) -> LongVilaGeometry:
    """See :class:`~pevlm_sglang.families.sizes.SizeRules`."""
    vision = read_json(directory / "vision_tower" / "config.json")
    projector = str(read_json(directory / "mm_projector" / "config.json").get("mm_projector_type"))
    if projector not in DOWNSAMPLE:
        raise ValueError(
            f"mm_projector_type: expected one of {', '.join(DOWNSAMPLE)}, got {projector}"
        )
    return LongVilaGeometry(
        image_size=whole(vision, "image_size"),
        patch_size=whole(vision, "patch_size"),
        merge_size=DOWNSAMPLE[projector],
        num_frames=whole(config, "num_video_frames", DEFAULT_NUM_FRAMES),
        context_length=context_length(read_json(directory / "llm" / "config.json")),
    )
