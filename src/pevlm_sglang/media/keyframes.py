"""Keyframes in place of sampled frames: pictures that a decoder reads by themselves.

Every other frame takes all frames from the keyframe before it. In a long file, of which few frames
are sampled, that is nearly the whole file; the keyframes near the sampled ones are a hundredth.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from pevlm_sglang.media.video_file import length_and_rate


def keyframes(video: Any) -> list[int] | None:
    """Of SGLang's ``VideoDecoderWrapper``, or of what is known of a file: numbers of frames, as
    they are shown; None where its decoder does not tell."""
    if hasattr(video, "keyframes"):  # known
        known: list[int] | None = video.keyframes
        return known
    from torchcodec import _core

    find = getattr(_core, "_get_key_frame_indices", None)
    handle = getattr(getattr(video, "_decoder", None), "_decoder", None)
    return None if find is None or handle is None else find(handle).tolist()


def in_place_of(video: Any, indices: Sequence[int]) -> list[int]:
    """Which frames of a video are taken, where a request wishes for its keyframes.

    Args:
        video: SGLang's ``VideoDecoderWrapper``.
        indices: of the sampled frames, ascending.

    Raises:
        ValueError: the server's decoder does not tell keyframes.
    """
    if (keys := keyframes(video)) is None:
        raise ValueError(
            "frames: expected no wish, this server's decoder does not tell which frames are "
            "keyframes, got 'keyframes'; install torchcodec there"
        )
    return nearest(indices, keys, length_and_rate(video)[0])


def nearest(indices: Sequence[int], keys: Sequence[int], total: int) -> list[int]:
    """For each sampled frame the nearest keyframe within half a sampling interval, or itself.

    A keyframe takes the place of one frame, the earlier one of two; so the result ascends as
    ``indices`` does.

    Args:
        indices: of the sampled frames, ascending, evenly but for their rounding.
        keys: of the keyframes, ascending.
        total: frames of the file, the interval of a single sampled one.
    """
    steps = len(indices) - 1
    interval = (indices[-1] - indices[0]) / steps if steps else total
    taken: list[int] = []
    for index in indices:
        after = bisect_left(keys, index)
        near = [
            key
            for key in keys[max(after - 1, 0) : after + 1]
            if 2 * abs(key - index) <= interval and (not taken or key > taken[-1])
        ]
        taken.append(min(near, key=lambda key: abs(key - index), default=index))
    return taken
