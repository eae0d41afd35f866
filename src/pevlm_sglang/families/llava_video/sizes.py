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
from pevlm_sglang.families.frame_counts import FrameGeometry, FrameSettings, evenly
from pevlm_sglang.families.sizes import context_length, read_json, section, whole

POOL_STRIDE = 2  # of the reference, whatever a configuration says
_POOLED_SIDE = {"bilinear": math.ceil, "average": math.floor, "max": math.floor}
_KNOWN: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mm_patch_merge_type": ("flat", ("spatial_unpad",)),
    "add_faster_video": (False, (False, None)),
    "mm_spatial_pool_mode": ("bilinear", tuple(_POOLED_SIDE)),
    "mm_newline_position": ("one_token", ("grid", "frame", "one_token", "no_token")),
}
"""Names of a configuration → the reference's default, and what is known here."""


@dataclass(frozen=True)
class TokenLayout:
    """How many tokens the frames of a video become, and where the newlines are.

    Attributes:
        patches: features a side of a frame, before pooling.
        pool_mode: ``bilinear``, ``average`` or ``max``; the first rounds an odd side up, the others
            down.
        newline: ``grid`` (after each row), ``frame``, ``one_token`` (after the video) or
            ``no_token``.
    """

    patches: int
    pool_mode: str = "bilinear"
    newline: str = "grid"

    @classmethod
    def of(cls, hf_config: Any, patches: int) -> TokenLayout:
        """The layout of the model with this configuration.

        Raises:
            UnsupportedError: a layout that is not known here.
        """
        values = {name: getattr(hf_config, name, default) for name, (default, _) in _KNOWN.items()}
        for name, value in values.items():
            if value not in (allowed := _KNOWN[name][1]):
                expected = " or ".join(map(str, allowed))
                raise UnsupportedError(
                    f"{name} of the model's configuration: expected {expected}, got {value}; PEVLM "
                    "does not know how the frames of such a model are laid out"
                )
        return cls(patches, values["mm_spatial_pool_mode"], values["mm_newline_position"])

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


@dataclass(frozen=True)
class LlavaGeometry(FrameGeometry):
    """See the base.

    Attributes:
        layout: of a video's tokens.
    """

    model_type: str = "llava"
    context_length: int | None = 32_768
    image_size: int = 384
    num_frames: int = 64
    layout: TokenLayout = TokenLayout(patches=27)

    def indices(self, total_frames: int, fps: float, settings: FrameSettings) -> list[int]:
        """As the reference's ``load_video``, with ``force_sample`` where no rate is asked for."""
        if settings.fps is not None:
            # The reference has no answer to more than twice the video's own rate; it is all here.
            indices = list(range(0, total_frames, max(1, round(fps / settings.fps))))
            if len(indices) <= settings.num_frames:
                return indices
        return [int(position) for position in evenly(total_frames, settings.num_frames)]

    def steps(self, frames: int) -> tuple[int, ...]:
        steps = [self.layout.tokens_per_frame] * frames
        steps[-1] += self.layout.tokens(frames) - sum(steps)
        return tuple(steps)


_SIGLIP = "google/siglip-so400m-patch14-384"  # of the published checkpoint, and the defaults

PUBLISHED = {"llava_video": LlavaGeometry()}
"""LLaVA-Video-7B-Qwen2, by a name for the command line."""


def of_checkpoint(config: Mapping[str, Any], directory: Path) -> LlavaGeometry:
    """See :class:`~pevlm_sglang.families.sizes.SizeRules`."""
    tower: Mapping[str, Any] = vars(PUBLISHED["llava_video"])
    if (name := config.get("mm_vision_tower")) != _SIGLIP:
        if not isinstance(name, str):
            raise ValueError(f"mm_vision_tower: expected a name or a folder, got {name!r}")
        tower = read_json(Path(name) / "config.json")
        tower = section(tower, "vision_config", tower)
    image_size, patch_size = whole(tower, "image_size"), whole(tower, "patch_size")
    return LlavaGeometry(
        image_size=image_size,
        patch_size=patch_size,
        context_length=context_length(config),
        layout=TokenLayout.of(SimpleNamespace(**config), image_size // patch_size),
    )
