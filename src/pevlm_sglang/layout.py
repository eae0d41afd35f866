"""The idea: which token of a video prompt attends to which.

A video is cut into a sink (its first frames, with all text before them) and context blocks of a few
frames. A token of a block attends to the sink and to its own block; every other token attends to
everything before it. Prefill then costs O(T×N) pairs for T frames of N tokens, instead of
O((T×N)²). Positions are never changed.

Run this file to see the mask: ``python src/pevlm_sglang/layout.py``.

Source: the PEVLM paper, section 3 and equations (2)-(9). Equation (3) as printed lets a block see
the blocks before it; section 3.1, figure 3 and the operation count (7) do not, and are what is
built here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

Range = tuple[int, int]
"""A half-open range of token positions in the expanded prompt, ``[start, end)``."""

MOST_RANGES = 2**20
"""Of sinks and extents of all blocks of a prompt. They grow with blocks times videos before them: a
hundred videos of a hundred blocks have half as many."""


@dataclass(frozen=True)
class FrameSpans:
    """Where the steps of one video lie in the expanded prompt.

    A step is what the vision tower turns into one run of tokens, ``frames_per_step`` sampled
    frames.

    Attributes:
        steps: one range a step, in prompt order. The steps of a video tile it without gaps; those
            of an image run (one image a step) may have ordinary text between them.
        frames_per_step: sampled frames in a step (``temporal_patch_size`` for Qwen's models).
        image_run: True when the steps are neighbouring images and not the frames of one video.

    Raises:
        ValueError: no step, an empty step, steps out of order, or a gap inside a video.
    """

    steps: tuple[Range, ...]
    frames_per_step: int = 1
    image_run: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("FrameSpans.steps: expected at least one step, got none")
        if self.frames_per_step < 1:
            raise ValueError(
                f"FrameSpans.frames_per_step: expected >= 1, got {self.frames_per_step}"
            )
        for start, end in self.steps:
            if not 0 <= start < end:
                raise ValueError(
                    f"FrameSpans.steps: expected 0 <= start < end, got [{start}, {end})"
                )
        for (_, end), (start, _) in pairwise(self.steps):
            if start < end or (start > end and not self.image_run):
                raise ValueError(
                    "FrameSpans.steps: expected steps in prompt order"
                    f"{'' if self.image_run else ' without gaps'}, "
                    f"got one that ends at {end} before one that starts at {start}"
                )

    @property
    def start(self) -> int:
        return self.steps[0][0]

    @property
    def end(self) -> int:
        return self.steps[-1][1]

    def to_steps(self, frames: int) -> int:
        """A number of sampled frames in whole steps, rounded up."""
        return whole_steps(frames, self.frames_per_step)


@dataclass(frozen=True, slots=True)
class ContextBlock:
    """One context block: the LOCAL tokens of a few steps, and the keys that they see.

    Attributes:
        video: index of the video in the prompt.
        index: index of the block in its video.
        tokens: ranges of LOCAL tokens; more than one only where an image run has text in between.
        sink: ranges of GLOBAL tokens up to the end of the video's last sink step, coalesced.
        extent_start: end of the previous block, or of the sink.
    """

    video: int
    index: int
    tokens: tuple[Range, ...]
    sink: tuple[Range, ...]
    extent_start: int

    @property
    def start(self) -> int:
        return self.tokens[0][0]

    @property
    def end(self) -> int:
        return self.tokens[-1][1]

    def keys_up_to(self, position: int) -> tuple[Range, ...]:
        """What the LOCAL tokens before ``position`` see: the sink, and the block so far."""
        keys = [*self.sink]
        _extend(keys, (self.extent_start, position))
        return tuple(keys)


@dataclass(frozen=True)
class Piece:
    """Queries ``[start, end)`` that share one list of key ranges.

    The last key range ends at ``end``; the mask is causal, aligned to the bottom right. So a piece
    is one sequence with a cached prefix, as every attention library serves it.
    """

    start: int
    end: int
    keys: tuple[Range, ...]

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)

    def keys_before_start(self) -> tuple[Range, ...]:
        """The key ranges without the piece's own tokens."""
        *others, (start, _) = self.keys
        return (*others, (start, self.start))

    @property
    def num_pairs(self) -> int:
        """Attended (query, key) pairs."""
        n = self.num_queries
        return n * (self.num_keys - n) + n * (n + 1) // 2

    @property
    def is_full(self) -> bool:
        """Whether this is ordinary causal attention."""
        return self.keys == ((0, self.end),)


@dataclass(frozen=True)
class Layout:
    """The classes of all tokens of one prompt, for one sink and block size.

    A token is LOCAL when it lies in a context block and GLOBAL otherwise, generated tokens
    included. Its class depends only on tokens before it and on its own video, which is what makes
    prefix caching correct.
    """

    blocks: tuple[ContextBlock, ...] = ()

    @cached_property
    def _starts(self) -> list[int]:
        return [block.start for block in self.blocks]

    @classmethod
    def build(cls, videos: Sequence[FrameSpans], *, sink_frames: int, block_frames: int) -> Layout:
        """Lay out the videos of a prompt.

        Args:
            videos: in prompt order, not overlapping.
            sink_frames: sampled frames in the sink of each video; 0 makes the sink text only.
            block_frames: sampled frames in a context block. Both round up to whole steps.

        Raises:
            ValueError: a negative sink, an empty block, videos out of order, or more ranges than
                ``MOST_RANGES`` in what all blocks see.
        """
        if sink_frames < 0:
            raise ValueError(f"sink_frames: expected >= 0, got {sink_frames}")
        if block_frames < 1:
            raise ValueError(f"block_frames: expected >= 1, got {block_frames}")
        for earlier, later in pairwise(videos):
            if later.start < earlier.end:
                raise ValueError(
                    "videos: expected prompt order without overlap, got "
                    f"[{earlier.start}, {earlier.end}) before [{later.start}, {later.end})"
                )
        blocks: list[ContextBlock] = []
        global_ranges: list[Range] = []  # all GLOBAL tokens before `cursor`
        cursor = listed = 0
        for index, video in enumerate(videos):
            n_sink = video.to_steps(sink_frames)
            n_block = video.to_steps(block_frames)
            sink_end = video.steps[min(n_sink, len(video.steps)) - 1][1] if n_sink else video.start
            _extend(global_ranges, (cursor, sink_end))
            cursor = sink_end
            firsts = range(n_sink, len(video.steps), n_block)
            sink = tuple(global_ranges) if firsts else ()
            listed += len(firsts) * (len(sink) + 1)
            if listed > MOST_RANGES:
                raise ValueError(
                    f"videos: expected at most {MOST_RANGES} ranges in what all blocks see, got "
                    "more; ask for larger blocks, or about fewer videos or images at a time"
                )
            for number, first in enumerate(firsts):
                extent_start = cursor
                steps = video.steps[first : first + n_block]
                tokens = [(steps[0][0], steps[-1][1])]
                if video.image_run:  # there may be text between its steps
                    tokens.clear()
                    for start, end in steps:
                        _extend(global_ranges, (cursor, start))
                        _extend(tokens, (start, end))
                        cursor = end
                cursor = tokens[-1][1]
                blocks.append(ContextBlock(index, number, tuple(tokens), sink, extent_start))
        return cls(tuple(blocks))

    def block_of(self, position: int) -> ContextBlock | None:
        """The context block whose LOCAL tokens hold ``position``; None for a GLOBAL token."""
        i = bisect_right(self._starts, position) - 1
        if i < 0:
            return None
        block = self.blocks[i]
        inside = any(start <= position < end for start, end in block.tokens)
        return block if inside else None

    def visible(self, q: int, k: int) -> bool:
        """Whether the token at ``q`` attends to the token at ``k``."""
        if k > q:
            return False
        block = self.block_of(q)
        if block is None:
            return True
        in_sink = any(start <= k < end for start, end in block.sink)
        return in_sink or k >= block.extent_start

    def pieces(self, start: int, end: int) -> list[Piece]:
        """Cut the tokens ``[start, end)`` at class boundaries, one piece a virtual sequence.

        Neighbouring pieces that are ordinary causal attention become one: a chunk without a real
        block boundary gives exactly ``[Piece(start, end, ((0, end),))]``.

        Raises:
            ValueError: unless ``0 <= start <= end``.
        """
        if not 0 <= start <= end:
            raise ValueError(f"pieces: expected 0 <= start <= end, got [{start}, {end})")
        pieces: list[Piece] = []
        for x, y, block in self._runs(start, end):
            piece = Piece(x, y, block.keys_up_to(y) if block else ((0, y),))
            if piece.is_full and pieces and pieces[-1].is_full:
                piece = Piece(pieces.pop().start, y, piece.keys)
            pieces.append(piece)
        return pieces

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int, ContextBlock | None]]:
        """The maximal runs of one class in ``[start, end)``."""
        position = start
        for block in self.blocks[max(0, bisect_right(self._starts, start) - 1) :]:
            if block.start >= end:
                break
            for x, y in block.tokens:
                x, y = max(x, position), min(y, end)
                if x >= y:
                    continue
                if position < x:
                    yield position, x, None
                yield x, y, block
                position = y
        if position < end:
            yield position, end, None

    @cached_property
    def first_sparse(self) -> int | None:
        """The first token that does not attend to all tokens before it; None if there is none.

        None exactly when PEVLM is full causal attention for this prompt: no video, or no more
        frames than the sink and one block hold.
        """
        for block in self.blocks:
            for x, y in block.tokens:
                if not Piece(x, y, block.keys_up_to(y)).is_full:
                    return x
        return None

    def num_pairs(self, start: int, end: int) -> int:
        """Attended pairs of the queries ``[start, end)``."""
        return sum(piece.num_pairs for piece in self.pieces(start, end))

    def most_keys(self, length: int, window: int) -> int:
        """Keys that the pieces of a forward list at most, of ``window`` tokens in a row of a prompt
        of ``length``. As :meth:`pieces` cuts them, without making their lists."""
        starts: list[int] = []
        ends: list[int] = []
        counts: list[int] = []
        video, local, in_sink = -1, 0, 0
        for start, end, block in self._runs(0, length):
            keys = end
            if block is not None:
                if block.video != video:  # its first block; all before is sink or earlier blocks
                    video, in_sink = block.video, block.extent_start - local
                local += end - start
                keys = in_sink + end - block.extent_start
            if keys == end and ends and ends[-1] == counts[-1]:  # neighbours, both full
                start = starts.pop()
                del ends[-1], counts[-1]
            starts.append(start)
            ends.append(end)
            counts.append(keys)
        most = listed = first = 0
        for start, keys in zip(starts, counts, strict=True):
            listed += keys
            while ends[first] - 1 + window <= start:
                listed -= counts[first]
                first += 1
            most = max(most, listed)
        return most

    def visible_fraction(self, length: int) -> float:
        """Attended pairs of a prompt over those of full causal attention.

        Its inverse is the speed-up of attention that the arithmetic allows.
        """
        return self.num_pairs(0, length) / full_pairs(0, length) if length else 1.0


def whole_steps(frames: int, frames_per_step: int) -> int:
    """A number of sampled frames in whole steps, rounded up."""
    return -(-frames // frames_per_step)


def full_pairs(start: int, end: int) -> int:
    """Pairs that full causal attention computes for the queries ``[start, end)``."""
    return (end * (end + 1) - start * (start + 1)) // 2


def _extend(ranges: list[Range], new: Range) -> None:
    """Append a range, merged with the last one where the two touch; skip an empty one."""
    start, end = new
    if start >= end:
        return
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append(new)


def draw(layout: Layout, length: int) -> str:
    """The mask as text, one row a query: ``█`` attended within a block, ``▒`` the sink that a
    block sees, ``░`` attended by a GLOBAL token, ``·`` skipped."""
    rows = []
    for q in range(length):
        block = layout.block_of(q)
        row = []
        for k in range(length):
            if k > q:
                row.append(" ")
            elif not layout.visible(q, k):
                row.append("·")
            elif block is None:
                row.append("░")
            else:
                row.append("█" if k >= block.extent_start else "▒")
        rows.append("".join(row).rstrip())
    return "\n".join(rows)


if __name__ == "__main__":
    # System prompt of 4 tokens, 7 steps of 4 tokens, question of 4: sink of 1 step, blocks of 2.
    example = FrameSpans(tuple((4 + 4 * i, 8 + 4 * i) for i in range(7)))
    picture = Layout.build([example], sink_frames=1, block_frames=2)
    print(draw(picture, 36))
    print(f"visible_fraction {picture.visible_fraction(36):.3f}")
