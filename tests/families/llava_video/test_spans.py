"""LLaVA-Video's frames: where they lie, how many tokens they are, which of them are sampled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pevlm_sglang.errors import FrameSpanError, UnsupportedError
from pevlm_sglang.families import registry
from pevlm_sglang.families.llava_video import spans as llava_video
from pevlm_sglang.families.llava_video.sizes import PUBLISHED, TokenLayout
from pevlm_sglang.families.llava_video.spans import FRAMES
from pevlm_sglang.families.spans import SpanRule
from pevlm_sglang.layout import FrameSpans

RULE = SpanRule(llava_video, 1)
LAYOUTS = [
    ("grid", "bilinear", 12, 0),
    ("grid", "average", 6, 0),
    ("frame", "bilinear", 10, 0),
    ("one_token", "max", 4, 1),
    ("no_token", "bilinear", 9, 0),
]  # newline, pooling, tokens of a frame with 5 features a side, tokens after a video


def spans(*items: Any) -> list[FrameSpans]:
    return RULE.spans(SimpleNamespace(mm_items=items), (), image_runs=False)


def item(modality: str, offsets: list | None, frames: int | None = None) -> Any:
    data = {} if frames is None else {FRAMES: frames}
    return SimpleNamespace(
        modality=SimpleNamespace(name=modality),
        is_video=lambda: modality == "VIDEO",
        is_image=lambda: modality == "IMAGE",
        offsets=offsets,
        model_specific_data=data,
    )


# --- Spans ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 300)), min_size=1, max_size=4),
    st.sampled_from(LAYOUTS),
    st.randoms(use_true_random=False),
)
def test_videos_split_into_frames(shapes: list, layout: tuple, random: Any) -> None:
    """Every placeholder in one step; the newline after a video in its last."""
    _, _, tokens, trailing = layout
    items, expected, at = [], [], 0
    for gap, frames in shapes:
        start = at + gap
        at = start + frames * tokens + trailing
        items.append(item("VIDEO", [(start, at - 1)], frames))
        starts = [start + i * tokens for i in range(frames)]
        expected.append([range(a, b) for a, b in zip(starts, [*starts[1:], at], strict=True)])
    random.shuffle(items)
    found = spans(*items)
    assert [[range(*step) for step in video.steps] for video in found] == expected


def test_a_newline_after_a_video_is_its_last_frame_s() -> None:
    [video] = spans(item("VIDEO", [(3, 15)], 3))
    assert video.steps == ((3, 7), (7, 11), (11, 16))


def test_frames_of_a_list_are_one_video() -> None:
    """Text of the chat template between them belongs to none of them."""
    found = spans(*(item("VIDEO", [(3 + 14 * i, 14 + 14 * i)]) for i in range(4)))
    assert found == [FrameSpans(tuple((3 + 14 * i, 15 + 14 * i) for i in range(4)), image_run=True)]


@pytest.mark.parametrize(("gap", "videos"), [(32, 1), (33, 2)])
def test_lists_far_from_each_other_are_two_videos(gap: int, videos: int) -> None:
    items = [item("VIDEO", [(start, start + 11)]) for start in (0, 13, 25 + gap, 38 + gap)]
    assert len(spans(*items)) == videos


def test_a_video_between_two_frames_ends_the_list() -> None:
    items = (item("VIDEO", [(0, 11)]), item("VIDEO", [(12, 23)], 1), item("VIDEO", [(24, 35)]))
    assert [video.steps for video in spans(*items)] == [((0, 12),), ((12, 24),), ((24, 36),)]


def test_pictures_are_no_video() -> None:
    items = (item("IMAGE", [(0, 25)]), item("VIDEO", [(30, 53)], 2), item("IMAGE", [(60, 85)]))
    assert [video.steps for video in spans(*items)] == [((30, 42), (42, 54))]
    assert llava_video.image_ranges(SimpleNamespace(mm_items=items)) == [(0, 26), (60, 86)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (item("VIDEO", None, 3), "video item: expected offsets, got none"),
        (item("VIDEO", [(0, 11), (12, 23)], 2), "expected one offset, got 2"),
        (item("VIDEO", [(0, 37)], 3), "video of 3 steps: .* equal steps, got 38"),
        (item("VIDEO", [(0, 11)], 0), "video of 0 steps"),
        (item("VIDEO", [(0, 1)], 3), "video of 3 steps"),
    ],
)
def test_items_that_do_not_fit(bad: Any, message: str) -> None:
    with pytest.raises(FrameSpanError, match=message):
        spans(bad)


# --- Geometry ------------------------------------------------------------------------------------


def config(**changes: Any) -> Any:
    published = {
        "architectures": ["LlavaQwenForCausalLM"],
        "add_faster_video": False,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
    }
    return SimpleNamespace(**published | changes)


def test_published_geometry() -> None:
    layout = TokenLayout.of(config(), patches=27)
    assert (layout.side, layout.tokens_per_frame, layout.tokens(64)) == (14, 210, 64 * 210)
    assert registry.span_rule(config()) == RULE
    assert PUBLISHED["llava_video"].layout == layout


def test_what_show_predicts() -> None:
    geometry = PUBLISHED["llava_video"]
    video = geometry.video(9000, 30.0, (1280, 720), geometry.settings({}))
    assert (video.frames, video.steps, video.resized) == (64, (210,) * 64, (384, 384))
    settings = geometry.settings({"fps": 1, "num_frames": 400})
    assert geometry.video(9000, 30.0, (1280, 720), settings).frames == 300
    assert geometry.sample(64, geometry.settings({})) == (64, 1.0)
    with pytest.raises(ValueError, match="64 are sampled from any video here"):
        geometry.sample(32, geometry.settings({}))


@pytest.mark.parametrize(("newline", "mode", "tokens", "trailing"), LAYOUTS)
def test_tokens_of_a_frame(newline: str, mode: str, tokens: int, trailing: int) -> None:
    layout = TokenLayout(5, mode, newline)
    assert layout.tokens_per_frame == tokens
    assert layout.tokens(7) == 7 * tokens + trailing


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_newline_position": "row"},
        {"mm_patch_merge_type": "flat"},
        {"mm_spatial_pool_mode": "area"},
        {"add_faster_video": True},
    ],
)
def test_another_layout_is_refused_at_start(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"{next(iter(changes))} of the model's config"):
        registry.span_rule(config(**changes))


# --- Sampling ------------------------------------------------------------------------------------


def sampled(total: int, video_fps: float, frames: int, fps: float | None) -> list[int]:
    geometry = PUBLISHED["llava_video"]
    return geometry.indices(total, video_fps, geometry.settings({"num_frames": frames, "fps": fps}))


@pytest.mark.parametrize("total", [1, 2, 63, 64, 65, 154, 300, 7201])  # 154: rounding shows
@pytest.mark.parametrize("frames", [1, 8, 16, 17, 64])
def test_even_sampling(total: int, frames: int) -> None:
    indices = sampled(total, 29.97, frames, None)
    assert indices == np.linspace(0, total - 1, frames, dtype=int).tolist()


def test_sampling_by_the_second() -> None:
    assert sampled(100, 29.97, 64, 1) == [0, 30, 60, 90]
    assert sampled(100, 29.97, 3, 1) == [0, 49, 99]
    assert sampled(5, 10, 64, 100) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 3}, "video setting frames: expected one of num_frames, fps, max_frames"),
        ({"num_frames": 0}, "num_frames: expected a whole number of more than 0, got 0"),
        ({"num_frames": 2.5}, "num_frames: expected a whole number"),
        ({"max_frames": True}, "max_frames: expected a whole number"),
        ({"max_frames": 32}, r"num_frames: expected at most max_frames \(32\), got 64"),
        ({"fps": "2"}, "fps: expected a number of more than 0, got '2'"),
        ({"fps": float("inf")}, "fps: expected a number"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PUBLISHED["llava_video"].settings(values)
    pytest.importorskip("sglang")
    with pytest.raises(UnsupportedError, match=f"^--mm-process-config: {message}"):
        registry.check_launch(config(), values)
