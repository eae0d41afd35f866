"""Videos that are in patches already, on their way through transformers' processor, which writes
their tokens into the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.video_utils import VideoMetadata

IDENTITIES = "pevlm_video_identities"
_PATCHED = "pevlm_patched_videos"


@dataclass(frozen=True)
class PatchedVideos:
    """The videos of a prompt.

    Attributes:
        patches: ``[patches, dim]``, one video after the other.
        grids: of each: steps, patches in a column, patches in a row.
        metadata: of each, as transformers takes it.
        identities: of each, see :mod:`pevlm_sglang.media.identity`.
    """

    patches: torch.Tensor
    grids: Sequence[tuple[int, int, int]]
    metadata: Sequence[dict[str, Any]]
    identities: Sequence[int]

    def stand_ins(self) -> list[torch.Tensor]:
        """What goes through SGLang and transformers in place of each video's frames: as many of
        them, ``[n, 3, 1, 1]``, and empty."""
        videos = [
            torch.zeros(1, dtype=torch.uint8).expand(len(one["frames_indices"]), 3, 1, 1)
            for one in self.metadata
        ]
        setattr(videos[0], _PATCHED, self)
        return videos


def patched_videos(videos: Any) -> PatchedVideos | None:
    """What stands behind these; None where they are no :meth:`PatchedVideos.stand_ins`."""
    return getattr(videos[0], _PATCHED, None) if isinstance(videos, list) and videos else None


class PatchedVideoProcessor:
    """In place of transformers' video processor: passes on what is in patches already, and leaves
    everything else to that."""

    def __init__(self, upstream: Any) -> None:
        self._upstream = upstream

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_upstream":  # asked for while it is copied
            raise AttributeError(name)
        return getattr(self._upstream, name)

    def __call__(self, videos: Any, **kwargs: Any) -> Any:
        if (patched := patched_videos(videos)) is None:
            return self._upstream(videos, **kwargs)
        return BatchFeature(
            {
                "pixel_values_videos": patched.patches,
                "video_grid_thw": torch.tensor(patched.grids),
                "video_metadata": [VideoMetadata(**one) for one in patched.metadata],
                IDENTITIES: torch.tensor(patched.identities),
            }
        )
