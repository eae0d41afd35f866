"""The mask of spec'd PEVLM, token by token, from the definition and not from ``layout.py``.

Classes: every token outside videos, and the tokens of a video's sink steps, are GLOBAL; the others
are LOCAL to a block of their video. A GLOBAL token sees all tokens before it. A LOCAL token sees
the GLOBAL tokens up to the end of its video's sink, and its own block from the end of the block
before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Steps = Sequence[tuple[int, int]]


def spec_mask(
    length: int,
    videos: Sequence[Steps],
    *,
    sink_steps: int | Sequence[int],
    block_steps: int | Sequence[int],
) -> np.ndarray:
    """Which token attends to which.

    Args:
        length: tokens in the prompt.
        videos: a video's steps as half-open token ranges, in prompt order. The steps of an image
            run, which counts as a video, have gaps between them: ordinary text, and so GLOBAL, but
            part of a block's extent.
        sink_steps, block_steps: sizes in whole steps, of all videos or one a video.

    Returns:
        ``[length, length]`` bool, ``[q, k]``.
    """
    is_global = np.ones(length, dtype=bool)
    sink_end = np.zeros(length, dtype=np.int64)  # of the token's video
    extent_start = np.zeros(length, dtype=np.int64)  # of the token's block
    sinks = np.broadcast_to(sink_steps, len(videos)).tolist()
    blocks = np.broadcast_to(block_steps, len(videos)).tolist()
    for steps, sink, block in zip(videos, sinks, blocks, strict=True):
        for j in range(sink, len(steps)):
            end_of_sink = steps[sink - 1][1] if sink else steps[0][0]
            first = sink + (j - sink) // block * block  # of its block
            tokens = slice(*steps[j])
            is_global[tokens] = False
            sink_end[tokens] = end_of_sink
            extent_start[tokens] = steps[first - 1][1] if first > sink else end_of_sink
    q, k = np.ogrid[:length, :length]
    in_sink = is_global[k] & (k < sink_end[q])
    in_block = k >= extent_start[q]
    return (k <= q) & (is_global[q] | in_sink | in_block)
