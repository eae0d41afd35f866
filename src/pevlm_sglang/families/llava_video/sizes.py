"""Sampled frames and tokens of a video in LLaVA-Video, for the server and for ``pevlm show``.

Source: LLaVA-NeXT, ``get_2dPool`` and ``prepare_inputs_labels_for_multimodal`` in
llava/model/llava_arch.py, and ``load_video`` in docs/LLaVA_Video_1003.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.families.frame_counts import SETTINGS, WISHES, FrameGeometry, FrameSettings
from pevlm_sglang.families.sizes import read_json

__all__ = ["PUBLISHED", "SETTINGS", "WISHES", "of_checkpoint"]

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


DEFAULT_NUM_FRAMES = 64


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
    if fps is not None:
        # The reference has no answer to an fps of more than twice the video's own; it is all here.
        indices = list(range(0, total_frames, max(1, round(video_fps / fps))))
        if len(indices) <= frames:
            return indices
    if frames == 1:
        return [0]
    last = total_frames - 1  # np.linspace(0, last, frames, dtype=int), rounding included
    return [math.floor(i * (last / (frames - 1))) for i in range(frames - 1)] + [last]


@dataclass(frozen=True)
class LlavaGeometry(FrameGeometry):
    """See the base.

    Attributes:
        layout: of a video's tokens.
    """

    image_size: int = 384
    num_frames: int = DEFAULT_NUM_FRAMES
    context_length: int | None = 32_768
    model_type: str = "llava"
    layout: TokenLayout = TokenLayout(patches=27)

    def sampled(self, total_frames: int, fps: float, settings: FrameSettings) -> int:
        return len(sampled_frames(total_frames, fps, settings.num_frames, settings.fps))

    def steps(self, frames: int) -> tuple[int, ...]:
        steps = [self.layout.tokens_per_frame] * frames
        steps[-1] += self.layout.tokens(frames) - sum(steps)
        return tuple(steps)


_SIGLIP = ("google/siglip-so400m-patch14-384", 384, 14)

PUBLISHED = {"llava_video": LlavaGeometry()}
"""LLaVA-Video-7B-Qwen2, by a name for the command line."""


def of_checkpoint(config: Mapping[str, Any], directory: Path) -> LlavaGeometry:
    """See :class:`~pevlm_sglang.families.sizes.SizeRules`."""
    name = config.get("mm_vision_tower")
    if name == _SIGLIP[0]:
        _, image_size, patch_size = _SIGLIP
    else:
        tower = read_json(Path(str(name)) / "config.json")
        tower = tower.get("vision_config", tower)
        image_size, patch_size = int(tower["image_size"]), int(tower["patch_size"])
    layout = TokenLayout.of(SimpleNamespace(**config), image_size // patch_size)
    return LlavaGeometry(
        image_size=image_size,
        patch_size=patch_size,
        context_length=config.get("max_position_embeddings"),
        layout=layout,
    )
