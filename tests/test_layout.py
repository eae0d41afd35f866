"""layout.py against the token-by-token oracle, a layout by hand, and the paper's cost."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_oracle import GLOBAL, Prompt, Video, blocks, classes, prompts, sinks, visible_keys, write

from pevlm_sglang import layout as layout_module
from pevlm_sglang.layout import ContextBlock, FrameSpans, Layout, Piece, draw, full_pairs

GENERATED = 3
"""Tokens after the prompt; the layout is built once and serves them too."""


def build(prompt: Prompt, sink: int, block: int) -> Layout:
    return Layout.build(prompt.videos, sink_frames=sink, block_frames=block)


def label_of(layout: Layout, position: int) -> object:
    block = layout.block_of(position)
    return GLOBAL if block is None else (block.video, block.index)


def expand(pieces: list[Piece]) -> list[tuple[int, set[int]]]:
    """Each query with its keys, in the order of the pieces: causal, aligned to the bottom right."""
    rows = []
    for piece in pieces:
        keys = [k for start, end in piece.keys for k in range(start, end)]
        for q in range(piece.start, piece.end):
            rows.append((q, set(keys[: len(keys) - (piece.end - 1 - q)])))
    return rows


def chunks(cuts: set[int], end: int) -> list[tuple[int, int]]:
    return list(pairwise(sorted({0, end} | {cut % (end + 1) for cut in cuts})))


cut_sets = st.sets(st.integers(0, 10_000), max_size=12)


@given(prompts(), sinks, blocks)
def test_classes_and_visible_equal_the_oracle(prompt: Prompt, sink: int, block: int) -> None:
    layout = build(prompt, sink, block)
    rows = visible_keys(prompt, sink, block, GENERATED)
    for q, row in enumerate(rows):
        assert {k for k in range(len(rows)) if layout.visible(q, k)} == row
    for position, label in enumerate(classes(prompt, sink, block)):
        assert label_of(layout, position) == label


@given(prompts(), sinks, blocks, cut_sets)
def test_pieces_of_any_chunking_expand_to_visible(
    prompt: Prompt, sink: int, block: int, cuts: set[int]
) -> None:
    layout = build(prompt, sink, block)
    rows = visible_keys(prompt, sink, block, GENERATED)
    pieces = [p for chunk in chunks(cuts, len(rows)) for p in layout.pieces(*chunk)]
    # Every query exactly once and in order: the tokens of a batch are contiguous.
    assert expand(pieces) == list(enumerate(rows))
    for piece in pieces:
        assert all(start < end for start, end in piece.keys)
        assert all(left < right for (_, left), (right, _) in pairwise(piece.keys)), "coalesced"
        assert piece.keys[-1][0] <= piece.start < piece.end == piece.keys[-1][1]


@given(prompts(), sinks, blocks, cut_sets)
def test_chunk_ends_are_the_only_extra_cuts(
    prompt: Prompt, sink: int, block: int, cuts: set[int]
) -> None:
    layout = build(prompt, sink, block)
    parts = chunks(cuts, len(prompt) + GENERATED)
    whole = {(piece.start, piece.end) for piece in layout.pieces(0, parts[-1][1])}
    for start, end in parts:
        expected = {(max(x, start), min(y, end)) for x, y in whole if x < end and y > start}
        assert {(piece.start, piece.end) for piece in layout.pieces(start, end)} == expected


@given(prompts(), sinks, blocks)
def test_pieces_are_as_few_as_possible(prompt: Prompt, sink: int, block: int) -> None:
    for left, right in pairwise(build(prompt, sink, block).pieces(0, len(prompt))):
        assert right.keys != (*left.keys[:-1], (left.keys[-1][0], right.end))


@given(prompts(), sinks, blocks, st.integers(0, 300), st.integers(0, 300))
def test_pairs_are_those_of_the_dense_mask(
    prompt: Prompt, sink: int, block: int, start: int, n: int
) -> None:
    layout = build(prompt, sink, block)
    rows = visible_keys(prompt, sink, block, GENERATED)
    start = min(start, len(rows))
    end = min(start + n, len(rows))
    assert layout.num_pairs(start, end) == sum(len(row) for row in rows[start:end])
    assert full_pairs(start, end) == sum(q + 1 for q in range(start, end))
    total = sum(len(row) for row in rows)
    assert layout.visible_fraction(len(rows)) == total / sum(q + 1 for q in range(len(rows)))


def test_empty_prompt() -> None:
    assert Layout().pieces(0, 0) == []
    assert Layout().visible_fraction(0) == 1.0


@given(prompts(), sinks, blocks)
def test_first_sparse_is_the_first_row_that_is_not_full(
    prompt: Prompt, sink: int, block: int
) -> None:
    rows = visible_keys(prompt, sink, block, GENERATED)
    first = next((q for q, row in enumerate(rows) if len(row) < q + 1), None)
    assert build(prompt, sink, block).first_sparse == first


@given(prompts(), sinks, blocks, st.data())
def test_a_prefix_does_not_depend_on_what_follows(
    prompt: Prompt, sink: int, block: int, data: st.DataObject
) -> None:
    """What makes prefix caching correct. An image run may also be cut between two images."""
    count = data.draw(st.integers(0, len(prompt.videos)))
    kept = list(prompt.videos[:count])
    if kept and kept[-1].image_run:
        images = data.draw(st.integers(1, len(kept[-1].steps)))
        kept[-1] = FrameSpans(kept[-1].steps[:images], image_run=True)
    rest = [video.start for video in prompt.videos[count:]]
    later_images = prompt.videos[count - 1].steps[len(kept[-1].steps) :] if kept else ()
    end = min([start for start, _ in later_images] + rest + [len(prompt)])
    short = Layout.build(kept, sink_frames=sink, block_frames=block)
    full = build(prompt, sink, block)
    for q in range(end):
        assert label_of(short, q) == label_of(full, q)
        assert all(short.visible(q, k) == full.visible(q, k) for k in range(q + 1))


@pytest.mark.parametrize(
    ("prompt", "sink", "block"),
    [
        pytest.param(write(30), 0, 1, id="no video"),
        pytest.param(write(4, Video((3,) * 5), 4), 2, 3, id="steps = sink + block"),
        pytest.param(write(4, Video((3,) * 5), 4), 4, 3, id="steps < sink + block"),
        pytest.param(write(4, Video((3,) * 5), 4), 5, 1, id="steps = sink"),
        pytest.param(write(4, Video((3,) * 5), 4), 0, 5, id="no sink"),
        pytest.param(write(Video((3,) * 5)), 1, 4, id="video alone"),
        pytest.param(write(4, Video((3,) * 4, frames_per_step=2), 4), 3, 3, id="rounded up"),
        pytest.param(write(4, Video((3, 1, 2), gaps=(2, 1)), 4), 1, 2, id="image run"),
        pytest.param(write(4, Video((3,) * 2), 2, Video((3,) * 2), 4), 2, 1, id="two sinks"),
    ],
)
@pytest.mark.parametrize("cuts", [(), (1,), (5, 9, 14)])
def test_degenerate_cases_are_one_full_piece(
    prompt: Prompt, sink: int, block: int, cuts: tuple[int, ...]
) -> None:
    layout = build(prompt, sink, block)
    assert layout.first_sparse is None
    assert layout.visible_fraction(len(prompt)) == 1.0
    for start, end in chunks(set(cuts), len(prompt)):
        assert layout.pieces(start, end) == [Piece(start, end, ((0, end),))]


def test_one_step_more_than_sink_and_block_is_sparse() -> None:
    layout = build(write(4, Video((3,) * 6), 4), 2, 3)
    assert layout.first_sparse == 4 + 5 * 3


# --- A ragged layout by hand: text, a video, text, an image run with text in its gaps, a question.

RAGGED = write(2, Video((1, 2, 1, 3)), 2, Video((1, 2, 1, 1), gaps=(1, 1, 1)), 2)
RAGGED_PICTURE = """\
░
░░
░░░
▒▒▒█
▒▒▒██
▒▒▒███
▒▒▒···█
▒▒▒···██
▒▒▒···███
░░░░░░░░░░
░░░░░░░░░░░
░░░░░░░░░░░░
░░░░░░░░░░░░░
▒▒▒······▒▒▒██
▒▒▒······▒▒▒███
░░░░░░░░░░░░░░░░
▒▒▒······▒▒▒█████
░░░░░░░░░░░░░░░░░░
▒▒▒······▒▒▒·····██
░░░░░░░░░░░░░░░░░░░░
░░░░░░░░░░░░░░░░░░░░░"""


def test_golden_layout() -> None:
    layout = build(RAGGED, 1, 2)
    sink_of_run = ((0, 3), (9, 12))
    assert layout.blocks == (
        ContextBlock(0, 0, ((3, 6),), ((0, 3),), 3),
        ContextBlock(0, 1, ((6, 9),), ((0, 3),), 6),
        ContextBlock(1, 0, ((13, 15), (16, 17)), sink_of_run, 12),
        ContextBlock(1, 1, ((18, 19),), sink_of_run, 17),
    )
    assert (layout.blocks[2].start, layout.blocks[2].end) == (13, 17)
    assert layout.first_sparse == 6
    pieces = layout.pieces(0, 21)
    assert pieces == [
        Piece(0, 6, ((0, 6),)),
        Piece(6, 9, ((0, 3), (6, 9))),
        Piece(9, 13, ((0, 13),)),
        Piece(13, 15, ((0, 3), (9, 15))),
        Piece(15, 16, ((0, 16),)),
        Piece(16, 17, ((0, 3), (9, 17))),
        Piece(17, 18, ((0, 18),)),
        Piece(18, 19, ((0, 3), (9, 12), (17, 19))),
        Piece(19, 21, ((0, 21),)),
    ]
    assert [(piece.num_keys, piece.num_pairs) for piece in pieces[-4:]] == [
        (11, 11),
        (18, 18),
        (8, 8),
        (21, 41),
    ]
    assert pieces[3].keys_before_start() == ((0, 3), (9, 13))
    assert pieces[1].keys_before_start() == ((0, 3), (6, 6))


def test_golden_chunk_from_the_middle_of_a_block() -> None:
    assert build(RAGGED, 1, 2).pieces(7, 14) == [
        Piece(7, 9, ((0, 3), (6, 9))),
        Piece(9, 13, ((0, 13),)),
        Piece(13, 14, ((0, 3), (9, 14))),
    ]


def test_golden_picture_round_trip() -> None:
    """Layout to picture, picture to mask, mask to the pieces' mask."""
    layout = build(RAGGED, 1, 2)
    assert draw(layout, 21) == RAGGED_PICTURE
    rows = [{k for k, cell in enumerate(row) if cell != "·"} for row in RAGGED_PICTURE.splitlines()]
    assert rows == visible_keys(RAGGED, 1, 2)
    assert expand(layout.pieces(0, 21)) == list(enumerate(rows))


def test_the_file_draws_itself() -> None:
    shown = subprocess.run(
        [sys.executable, layout_module.__file__],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={"PYTHONUTF8": "1"},
        check=True,
    ).stdout.splitlines()
    assert len(shown) == 37
    assert shown[0] == "░"
    assert shown[16] == "▒" * 8 + "·" * 8 + "█"  # first token of the second block
    assert shown[35] == "░" * 36
    # Sink of 8, blocks of 8, 8 and 8, question of 4: pairs by hand over 36 * 37 / 2.
    pairs = 36 + 3 * (8 * 8 + 36) + (33 + 34 + 35 + 36)
    assert shown[36] == f"visible_fraction {pairs / 666:.3f}"


# --- Cost ----------------------------------------------------------------------------------------


def one_video(text: int, frames: int, per_frame: int, question: int) -> tuple[FrameSpans, int]:
    steps = tuple((text + i * per_frame, text + (i + 1) * per_frame) for i in range(frames))
    return FrameSpans(steps), text + frames * per_frame + question


@pytest.mark.parametrize(
    ("text", "frames", "per_frame", "sink", "block", "question"),
    [(50, 100, 196, 16, 16, 100), (300, 80, 256, 2, 16, 30), (0, 333, 64, 0, 7, 0)],
)
def test_cost_formula(
    text: int, frames: int, per_frame: int, sink: int, block: int, question: int
) -> None:
    """``s²/2 + Σ(b_i·s + b_i²/2) + q·L``, which counts a causal triangle of n as n²/2 and the
    question's as a square."""
    video, length = one_video(text, frames, per_frame, question)
    layout = Layout.build([video], sink_frames=sink, block_frames=block)
    s = text + sink * per_frame
    sizes = [min(block, frames - first) * per_frame for first in range(sink, frames, block)]
    formula = s**2 / 2 + sum(b * s + b**2 / 2 for b in sizes) + question * length
    exact = formula + length / 2 - question**2 / 2
    assert layout.num_pairs(0, length) == exact
    assert layout.visible_fraction(length) == exact / full_pairs(0, length)


@pytest.mark.parametrize(
    ("text", "sink", "block", "speed_up", "tolerance"),
    [
        pytest.param(0, 16, 16, 8.2, 0.01, id="4k sink, 4k blocks"),
        pytest.param(64, 1, 8, 34, 0.1, id="system prompt and a frame"),
    ],
)
def test_speed_up_that_the_arithmetic_allows(
    text: int, sink: int, block: int, speed_up: float, tolerance: float
) -> None:
    """At 100k tokens with 256 tokens a frame, and a question of 128 tokens."""
    video, length = one_video(text, 390, 256, 128)
    assert length == pytest.approx(100_000, rel=0.01)
    layout = Layout.build([video], sink_frames=sink, block_frames=block)
    assert 1 / layout.visible_fraction(length) == pytest.approx(speed_up, rel=tolerance)


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": ()}, "expected at least one step"),
        ({"steps": ((0, 1),), "frames_per_step": 0}, "frames_per_step: expected >= 1, got 0"),
        ({"steps": ((3, 3),)}, r"got \[3, 3\)"),
        ({"steps": ((4, 3),)}, r"got \[4, 3\)"),
        ({"steps": ((-1, 3),)}, r"got \[-1, 3\)"),
        ({"steps": ((2, 4), (5, 6))}, "without gaps, got one that ends at 4 before .* at 5"),
        ({"steps": ((2, 4), (3, 6))}, "ends at 4 before one that starts at 3"),
        ({"steps": ((2, 4), (0, 2)), "image_run": True}, "in prompt order, got one that ends at 4"),
    ],
)
def test_frame_spans_refuse(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameSpans(**arguments)


@pytest.mark.parametrize(
    ("videos", "sink", "block", "message"),
    [
        ([(0, 4)], -1, 1, "sink_frames: expected >= 0, got -1"),
        ([(0, 4)], 0, 0, "block_frames: expected >= 1, got 0"),
        ([(0, 4), (3, 5)], 1, 1, r"without overlap, got \[0, 4\) before \[3, 5\)"),
        ([(5, 6), (0, 4)], 1, 1, "expected prompt order"),
    ],
)
def test_build_refuses(videos: list, sink: int, block: int, message: str) -> None:
    spans = [FrameSpans((video,)) for video in videos]
    with pytest.raises(ValueError, match=message):
        Layout.build(spans, sink_frames=sink, block_frames=block)


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (4, 3)])
def test_pieces_refuse_a_range_that_is_none(start: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf"expected 0 <= start <= end, got \[{start}, {end}\)"):
        Layout().pieces(start, end)


@given(prompts(min_videos=1), sinks)
def test_sizes_far_beyond_the_video(prompt: Prompt, sink: int) -> None:
    assert build(prompt, 10**30, 1).first_sparse is None
    assert build(prompt, sink, 10**30).blocks == build(prompt, sink, 10**4).blocks


@given(prompts(), sinks, blocks, st.integers(1, 200))
def test_most_keys_of_a_window(prompt: Prompt, sink: int, block: int, window: int) -> None:
    """No forward of so many tokens lists more."""
    layout = build(prompt, sink, block)
    length = len(classes(prompt, sink, block))
    listed = [
        sum(piece.num_keys for piece in layout.pieces(start, min(start + window, length)))
        for start in range(length)
    ]
    assert max(listed, default=0) <= layout.most_keys(length, window)
    assert layout.most_keys(length, length) == sum(p.num_keys for p in layout.pieces(0, length))


def test_as_many_ranges_as_a_plan_can_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three videos, each of two blocks behind its sink: the text before each is a range more."""
    monkeypatch.setattr(layout_module, "MOST_RANGES", 2 * (2 + 3 + 4))
    videos = [FrameSpans(tuple((at + i, at + i + 1) for i in range(3))) for at in (1, 11, 21)]
    assert len(Layout.build(videos, sink_frames=1, block_frames=1).blocks) == 6
    short = FrameSpans(((31, 32),))
    assert len(Layout.build([*videos, short], sink_frames=1, block_frames=1).blocks) == 6
    long = FrameSpans(((31, 32), (32, 33)))
    with pytest.raises(ValueError, match="videos: expected at most 18 ranges in what all blocks"):
        Layout.build([*videos, long], sink_frames=1, block_frames=1)
