"""The shelf of spans on Qwen2-VL's items: frame spans, or a clear refusal."""

from __future__ import annotations

import importlib.util
import re
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pevlm_sglang.errors import FrameSpanError, UnsupportedError
from pevlm_sglang.families import registry
from pevlm_sglang.families.internvl import spans as internvl
from pevlm_sglang.families.qwen_vl import QWEN2_VL
from pevlm_sglang.families.qwen_vl import spans as qwen_vl
from pevlm_sglang.families.qwen_vl import timestamps as qwen3_vl
from pevlm_sglang.families.refused import REASONS
from pevlm_sglang.families.spans import SpanRule
from pevlm_sglang.layout import FrameSpans

RULE = SpanRule(qwen_vl, 2)


class Modality(Enum):
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


class Item(SimpleNamespace):
    """The part of SGLang's ``MultimodalDataItem`` that is read."""

    def is_video(self) -> bool:
        return self.modality.name == "VIDEO"

    def is_image(self) -> bool:
        return self.modality.name == "IMAGE"


def item(modality: str, offsets: list | None, grid: list | None = None) -> Item:
    data = {} if grid is None else {"video_grid_thw": torch.tensor(grid)}
    return Item(modality=Modality[modality], offsets=offsets, model_specific_data=data)


def video(offsets: list | None, *grids: tuple[int, int, int]) -> Item:
    return item("VIDEO", offsets, [list(grid) for grid in grids])


def image(start: int, end: int) -> Item:
    """Of the tokens ``[start, end)``."""
    return item("IMAGE", [(start, end - 1)])


def real_item(fake: Item) -> Any:
    schedule_batch = pytest.importorskip("sglang.srt.managers.schedule_batch")
    return schedule_batch.MultimodalDataItem(
        modality=schedule_batch.Modality[fake.modality.name],
        offsets=fake.offsets,
        model_specific_data=fake.model_specific_data,
    )


@pytest.fixture(params=["fake", "sglang"])
def kind(request: pytest.FixtureRequest) -> Any:
    return real_item if request.param == "sglang" else lambda fake: fake


def spans(*items: Any, image_runs: bool = False) -> list[FrameSpans]:
    return RULE.spans(SimpleNamespace(mm_items=items), (), image_runs=image_runs)


def even(start: int, steps: int, tokens: int) -> FrameSpans:
    return FrameSpans(
        tuple((start + i * tokens, start + (i + 1) * tokens) for i in range(steps)), 2
    )


def run(*images: tuple[int, int]) -> FrameSpans:
    return FrameSpans(images, image_run=True)


# --- Videos --------------------------------------------------------------------------------------


def test_one_video(kind: Any) -> None:
    """Offsets are inclusive at the end; the grid is [steps, height, width] in patches."""
    assert spans(kind(video([(5, 5 + 3 * 6 - 1)], (3, 4, 6)))) == [even(5, 3, 6)]


def test_two_videos_in_one_item(kind: Any) -> None:
    found = spans(kind(video([(5, 22), (30, 37)], (3, 4, 6), (2, 4, 4))))
    assert found == [even(5, 3, 6), even(30, 2, 4)]


def test_two_videos_in_two_items_out_of_order(kind: Any) -> None:
    items = (kind(video([(30, 37)], (2, 4, 4))), kind(video([(5, 22)], (3, 4, 6))))
    assert spans(*items) == [even(5, 3, 6), even(30, 2, 4)]


def test_images_and_audio_are_no_videos(kind: Any) -> None:
    items = (
        kind(image(0, 4)),
        kind(video([(5, 22)], (3, 4, 6))),
        kind(item("AUDIO", None)),
        kind(image(40, 44)),
    )
    assert spans(*items) == [even(5, 3, 6)]
    assert spans(*items[2:]) == []


def test_no_items() -> None:
    assert spans() == spans(image_runs=True) == []


def test_offsets_may_be_lists_and_tensors() -> None:
    """The message format between SGLang's processes turns tuples into lists."""
    assert spans(video([[5, 22]], (3, 4, 6))) == [even(5, 3, 6)]
    found = spans(video([tuple(torch.tensor([5, 22]))], (3, 4, 6)))
    assert found == [even(5, 3, 6)]
    assert all(type(position) is int for step in found[0].steps for position in step)


@pytest.mark.parametrize(("width", "height"), [(644, 364), (364, 644), (83, 1001), (28, 28)])
@pytest.mark.parametrize("frames", [1, 2, 3, 63, 64, 299, 300])
def test_lengths_and_sizes(frames: int, width: int, height: int) -> None:
    """The processor pads to whole steps and rounds each side to 28 pixels, a token."""
    steps = -(-frames // 2)
    rows, columns = max(1, round(height / 28)), max(1, round(width / 28))
    tokens = rows * columns
    (found,) = spans(
        video([(17, 17 + steps * tokens - 1)], (steps, 2 * rows, 2 * columns)), image(9, 10)
    )
    assert found == even(17, steps, tokens)
    assert (found.start, found.end) == (17, 17 + steps * tokens)
    assert (found.to_steps(1), found.to_steps(16), found.to_steps(17)) == (1, 8, 9)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 50)), min_size=1, max_size=5
    ),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_any_videos_in_any_items(shapes: list, random: Any, one_item: bool) -> None:
    expected, position = [], 0
    for gap, steps, tokens in shapes:
        expected.append(even(position + gap, steps, tokens))
        position = expected[-1].end
    offsets = [(span.start, span.end - 1) for span in expected]
    grids = [(steps, 2, 2 * tokens) for _, steps, tokens in shapes]
    if one_item:
        items = [video(offsets, *grids)]
    else:
        items = [video([offset], grid) for offset, grid in zip(offsets, grids, strict=True)]
        random.shuffle(items)
    assert spans(*items) == expected


# --- Image runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (0, [run((3, 7), (7, 9))]),
        (32, [run((3, 7), (39, 41))]),
        (33, [run((3, 7)), run((40, 42))]),
    ],
)
def test_gap_of_an_image_run(gap: int, expected: list[FrameSpans]) -> None:
    assert spans(image(3, 7), image(7 + gap, 9 + gap), image_runs=True) == expected


def test_image_runs_are_off_by_default() -> None:
    assert spans(image(3, 7), image(8, 9)) == []


def test_image_run_over_items_in_any_order(kind: Any) -> None:
    items = (kind(image(20, 24)), kind(item("IMAGE", [(10, 13), (2, 5)])), kind(image(90, 91)))
    assert spans(*items, image_runs=True) == [run((2, 6), (10, 14), (20, 24)), run((90, 91))]


def test_a_video_between_ends_an_image_run() -> None:
    items = (image(0, 4), image(5, 9), video([(10, 27)], (3, 4, 6)), image(28, 32))
    found = spans(*items, image_runs=True)
    assert found == [run((0, 4), (5, 9)), even(10, 3, 6), run((28, 32))]


def test_an_image_is_one_step_and_one_frame() -> None:
    (found,) = spans(image(0, 4), image(5, 9), image_runs=True)
    assert found.frames_per_step == 1


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (video(None, (3, 4, 6)), "video item: expected offsets, got none"),
        (video([], (3, 4, 6)), "video item: expected offsets, got none"),
        (item("VIDEO", [(0, 5)]), "expected video_grid_thw, got none"),
        (video([(0, 5)], (1, 4, 6), (1, 4, 6)), r"one offset a video \(2 in .*\), got 1"),
        (video([(0, 5), (6, 11)], (1, 4, 6)), r"one offset a video \(1 in .*\), got 2"),
        (video([(0, 6)], (3, 4, 6)), "video of 3 steps: .* equal steps, got 7"),
        (video([(0, 5)], (7, 4, 6)), "video of 7 steps: .* equal steps, got 6"),
        (video([(0, 5)], (0, 4, 6)), "video of 0 steps: .* equal steps, got 6"),
        (video([(6, 5)], (2, 4, 6)), "video of 2 steps: .* equal steps, got 0"),
    ],
)
def test_items_that_do_not_fit(kind: Any, bad: Item, message: str) -> None:
    with pytest.raises(FrameSpanError, match=message):
        spans(kind(bad))


def test_images_without_offsets() -> None:
    with pytest.raises(FrameSpanError, match="image item: expected offsets, got none"):
        spans(item("IMAGE", None), image_runs=True)


# --- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", QWEN2_VL.architectures)
@pytest.mark.parametrize("temporal", [1, 2, 4])
def test_rule_of_a_model(architecture: str, temporal: int) -> None:
    config = SimpleNamespace(
        architectures=[architecture], vision_config=SimpleNamespace(temporal_patch_size=temporal)
    )
    assert registry.span_rule(config) == SpanRule(qwen_vl, temporal)


@pytest.mark.parametrize(
    ("architectures", "shown"),
    [
        (["LlamaForCausalLM"], "LlamaForCausalLM"),
        (["A", "B"], "A, B"),
        ([], "unknown"),
        (None, "unknown"),
    ],
)
def test_unknown_model_lists_the_supported(architectures: list | None, shown: str) -> None:
    with pytest.raises(UnsupportedError, match=f"model architecture {shown}.*supported: ") as error:
        registry.span_rule(SimpleNamespace(architectures=architectures))
    for known in QWEN2_VL.architectures:
        assert known in str(error.value)


@pytest.mark.parametrize("architecture", REASONS)
def test_refused_model_says_why(architecture: str) -> None:
    reason = f"model architecture {architecture}: .*: {re.escape(REASONS[architecture])}; supported"
    with pytest.raises(UnsupportedError, match=reason):
        registry.span_rule(SimpleNamespace(architectures=[architecture]))


def test_refused_models_are_sglang_s_own() -> None:
    """A name that is mistyped, or gone, would explain nothing to anyone."""
    sglang = importlib.util.find_spec("sglang")
    models = Path(sglang.submodule_search_locations[0]) / "srt/models"
    defined = {
        name
        for source in models.glob("*.py")
        for name in re.findall(r"^class (\w+)", source.read_text(), re.MULTILINE)
    }
    assert set(REASONS) <= defined


# --- Inputs that nobody's processor makes ----------------------------------------------------


@pytest.mark.parametrize("grid", [[4, 8, 8], 7, [[1, 2]], [["a", 1, 1]], [None]])
def test_grid_of_another_shape_is_refused(grid: Any) -> None:
    bad = Item(
        modality=Modality.VIDEO, offsets=[(0, 3)], model_specific_data={"video_grid_thw": grid}
    )
    message = "video_grid_thw: expected rows of three numbers"
    with pytest.raises(FrameSpanError, match=message):
        SpanRule(qwen_vl, 2).spans(SimpleNamespace(mm_items=[bad]), [7] * 4, image_runs=False)
    with pytest.raises(ValueError, match=message):
        qwen3_vl.label_items([bad], [7] * 4, object())


@pytest.mark.parametrize("mark", [5, [[1]], [[1, "a"]], "x", [None], [[0, 1]], [[1, -1]]])
def test_mark_of_another_shape_is_refused(mark: Any) -> None:
    bad = Item(
        modality=Modality.VIDEO, offsets=[(0, 3)], model_specific_data={"pevlm_labels": mark}
    )
    with pytest.raises(FrameSpanError, match="expected a video that this server sampled itself"):
        SpanRule(internvl, 1).spans(SimpleNamespace(mm_items=[bad]), [7] * 4, image_runs=False)
