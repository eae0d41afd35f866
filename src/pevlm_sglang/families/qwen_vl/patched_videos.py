"""Videos that are in patches already, on their way through transformers' processor, which writes
their tokens into the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.video_utils import VideoMetadata

from pevlm_sglang.families.spans import equal_steps, grid_rows, mark_continuing
from pevlm_sglang.media.cache import Clips
from pevlm_sglang.media.identity import identity

NUMBERS = "pevlm_video_numbers"
"""Of an item on its way: which of the prompt's videos it is of."""

_PATCHED = "pevlm_patched_videos"


@dataclass(frozen=True)
class PatchedVideos:
    """The videos of a prompt.

    Attributes:
        grids: of each: steps, patches in a column, patches in a row.
        metadata: of each, as transformers takes it.
        clips: of each; their pixels are patches ``[patches, dim]``.
    """

    grids: Sequence[tuple[int, int, int]]
    metadata: Sequence[dict[str, Any]]
    clips: Sequence[Clips]

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
                "pixel_values_videos": torch.zeros(1, 1).expand(sum(map(prod, patched.grids)), 1),
                "video_grid_thw": torch.tensor(patched.grids),
                "video_metadata": [VideoMetadata(**one) for one in patched.metadata],
                NUMBERS: torch.arange(len(patched.clips)),
            }
        )


def clip_items(item: Any, videos: Sequence[Clips]) -> Iterator[Any]:
    """An item a clip, in place of one of several videos.

    Args:
        item: SGLang's, with ``video_grid_thw`` and what else is said once a video; an offset a
            video, or one a step where timestamps stand between them.
        videos: that it is of.
    """
    rows, offsets = grid_rows(item), list(item.offsets)
    data = item.model_specific_data
    for number, (clips, (steps, height, width)) in enumerate(zip(videos, rows, strict=True)):
        if len(item.offsets) == len(rows):
            ranges = equal_steps((offsets[0][0], offsets[0][1] + 1), steps)
            own, offsets = [(start, end - 1) for start, end in ranges], offsets[1:]
        else:
            own, offsets = offsets[:steps], offsets[steps:]
        of_video = {name: value[number : number + 1] for name, value in data.items()}
        start = 0
        for clip in clips:
            end = start + clip.steps
            made = copy(item)
            made.feature = clip.pixels
            made.offsets = own[start:end]
            if len(item.offsets) == len(rows):
                made.offsets = [(own[start][0], own[end - 1][1])]
            made.model_specific_data = {
                **of_video,
                "video_grid_thw": torch.tensor([[clip.steps, height, width]]),
            }
            said = {name: torch.as_tensor(value).tolist() for name, value in of_video.items()}
            said["video_grid_thw"] = [clip.steps, height, width]  # not of all the video
            made.hash = identity(clip.digest, clip.pixels.dtype, sorted(said.items()))
            if start:
                mark_continuing(made)
            yield made
            start = end
