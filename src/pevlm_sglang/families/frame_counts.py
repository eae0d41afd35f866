"""Tokens of a video in InternVL3.5 and LongVILA: a number of frames, each of the same size, with
the text that the processor writes around it.

Source: ``processors/internvl.py`` and ``processors/longvila.py``, which follow the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pevlm_sglang.families import frame_settings as frame_knobs
from pevlm_sglang.families.frame_settings import FrameKnobs
from pevlm_sglang.families.internvl import spans as internvl
from pevlm_sglang.families.longvila import spans as longvila
from pevlm_sglang.families.sizes import VideoTokens, read_json

ARCHITECTURES: tuple[str, ...] = (*internvl.ARCHITECTURES, *longvila.ARCHITECTURES)
KNOBS = frame_knobs.KNOBS


@dataclass(frozen=True)
class FrameGeometry:
    """See :class:`~pevlm_sglang.families.sizes.Geometry`.

    Attributes:
        image_size: pixels a side of a frame as the vision tower sees it.
        patch_size: pixels a side of a patch.
        merge_size: patches a side that become one token; an odd number of patches is rounded up.
        num_frames: sampled from a video, where neither server nor request says.
        knob_names: that the family heeds.
        has_labels: whether the processor writes ``Frame1: <img>`` and ``</img>`` around a frame.
        template_tokens: of the chat template, before and after a video.
    """

    model_type: str
    image_size: int
    patch_size: int
    merge_size: int
    num_frames: int
    knob_names: tuple[str, ...]
    has_labels: bool
    template_tokens: tuple[int, int]
    default_prompt_tokens: int
    context_length: int | None = None
    frames_per_step: int = 1

    def knobs(self, values: Mapping[str, Any]) -> FrameKnobs:
        """See :meth:`FrameKnobs.of`."""
        return FrameKnobs.of(values, default=self.num_frames, names=self.knob_names)

    def sample(self, sampled: int, knobs: FrameKnobs) -> tuple[int, float]:
        """A file of as many frames as are sampled."""
        if sampled != knobs.num_frames:
            raise ValueError(
                f"{sampled} sampled frames: {knobs.num_frames} are sampled from any video here; "
                f"set num_frames to {sampled}"
            )
        return sampled, knobs.fps or 1.0

    def video(
        self, total_frames: int, fps: float, size: tuple[int, int], knobs: FrameKnobs
    ) -> VideoTokens:
        """What a file becomes; see the protocol. The size of its frames does not matter."""
        if total_frames < 1 or min(size) < 1:
            raise ValueError(f"video: expected a frame, got {total_frames} of {size}")
        frames = knobs.num_frames
        if knobs.fps is not None:
            frames = longvila.frames_at_rate(total_frames, fps, knobs.fps, knobs.num_frames)
        steps = tuple(self._step(number) for number in range(1, frames + 1))
        return VideoTokens(frames, steps, (self.image_size, self.image_size))

    def chat_template_tokens(self, prompt_tokens: int) -> tuple[int, int]:
        """See the protocol."""
        return self.template_tokens

    def _step(self, number: int) -> int:
        """Tokens of frame ``number``, counted from 1, and of its closing newline. A label is
        ``Frame``, a token a digit, ``:`` and a space; ``<img>`` and ``</img>`` follow."""
        side = -(-(self.image_size // self.patch_size) // self.merge_size)
        label = len(str(number)) + 5 if self.has_labels else 0
        return side**2 + label + 1


def _internvl(image_size: int = 448, patch_size: int = 14, **fields: Any) -> FrameGeometry:
    return FrameGeometry(
        "internvl_chat",
        image_size,
        patch_size,
        num_frames=internvl.DEFAULT_NUM_FRAMES,
        knob_names=internvl.KNOBS,
        has_labels=True,
        # SGLang's template internvl-2-5, with its Chinese system prompt: an estimate.
        template_tokens=(8, 5),
        default_prompt_tokens=42,
        **{"merge_size": 2, "context_length": 40_960} | fields,
    )


def _longvila(image_size: int = 448, patch_size: int = 14, **fields: Any) -> FrameGeometry:
    return FrameGeometry(
        "llava_llama",
        image_size,
        patch_size,
        knob_names=frame_knobs.KNOBS,
        has_labels=False,
        template_tokens=(8, 5),
        default_prompt_tokens=6,  # "You are a helpful assistant."
        **{"merge_size": 2, "num_frames": longvila.DEFAULT_NUM_FRAMES, "context_length": 131_072}
        | fields,
    )


PUBLISHED = {"internvl3_5": _internvl(), "longvila": _longvila()}
"""Of the published checkpoints. LongVILA-7B-256f's files were not at hand: its frames of 448 pixels
are those of its training script (longvila/train/5_long_sft_256frames.sh) and fit the PEVLM paper's
"approximately 4k tokens" for 16 of them; its context is what 256 frames need, to a power of two."""


def of_checkpoint(config: Mapping[str, Any], directory: Path) -> FrameGeometry:
    """The geometry of a checkpoint.

    Args:
        config: of ``config.json``.
        directory: of the checkpoint.

    Raises:
        ValueError: a missing file, or settings that are not known here.
    """
    if any(name in internvl.ARCHITECTURES for name in config.get("architectures") or ()):
        vision, text = config["vision_config"], config["llm_config"]
        ratio = config.get("downsample_ratio", 0.5)
        return _internvl(
            int(config.get("force_image_size") or vision["image_size"]),
            int(vision["patch_size"]),
            merge_size=round(1 / ratio),
            context_length=text.get("max_position_embeddings"),
        )
    vision = read_json(directory / "vision_tower" / "config.json")
    projector = str(read_json(directory / "mm_projector" / "config.json")["mm_projector_type"])
    if projector not in longvila.DOWNSAMPLE:
        raise ValueError(
            f"mm_projector_type: expected one of {', '.join(longvila.DOWNSAMPLE)}, got {projector}"
        )
    return _longvila(
        int(vision["image_size"]),
        int(vision["patch_size"]),
        merge_size=longvila.DOWNSAMPLE[projector],
        num_frames=int(config.get("num_video_frames") or longvila.DEFAULT_NUM_FRAMES),
        context_length=read_json(directory / "llm" / "config.json").get("max_position_embeddings"),
    )
