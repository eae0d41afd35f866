"""Qwen3-VL: the token stream of Hugging Face's processor → frame spans, or a clear refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pevlm_sglang.errors import FrameSpanError
from pevlm_sglang.families.qwen_vl import timestamps as qwen3_vl
from pevlm_sglang.families.spans import SpanRule, mark_continuing
from support.exchange import IMAGE, SYSTEM, VIDEO, user
from support.families.qwen3_vl import find_steps, make_tiny_model
from support.golden import describe

RULE = SpanRule(qwen3_vl, 2)
PADS = tuple(range(1_000_003, 1_000_007))
BARE = "<|video_pad|>"  # a video without the wrapper that the chat template writes
GOLDEN = Path(__file__).parents[2] / "golden" / "qwen3_vl.txt"


@dataclass(frozen=True)
class Video:
    """Sampled frames, as the processor is told of them.

    Attributes:
        steps, height, width: the row of ``video_grid_thw``, sides in patches.
        indices: of the sampled frames in the file.
        fps: of the file.
    """

    steps: int
    height: int
    width: int
    indices: tuple[int, ...]
    fps: float


def video(frames: int, height: int = 2, width: int = 2, every: int = 1, fps: float = 2.0) -> Video:
    """Of ``frames`` sampled frames, each ``every`` frames of the file."""
    return Video(-(-frames // 2), height, width, tuple(range(0, frames * every, every)), fps)


@dataclass(frozen=True)
class Stream:
    """A prompt that the processor expanded.

    Attributes:
        processor: Hugging Face's.
        ids: with the placeholder tokens themselves.
        videos: in prompt order.
    """

    processor: Any
    ids: list[int]
    videos: tuple[Video, ...]

    @property
    def expected(self) -> list[list[tuple[int, int]]]:
        """The steps, found in the decoded text."""
        return find_steps(self.processor.tokenizer, self.ids, [v.steps for v in self.videos])

    def inputs(self, clip: int = 10**6) -> SimpleNamespace:
        """The part of SGLang's ``MultimodalInputs`` that is read, in clips of so many steps."""
        runs = iter(_runs(self.ids, self.processor.video_token_id))
        items = []
        for v in self.videos:
            offsets = list(islice(runs, v.steps))
            for start in range(0, v.steps, clip):
                own = offsets[start : start + clip]
                items.append(_item("VIDEO", own, [[len(own), v.height, v.width]]))
                if start:
                    mark_continuing(items[-1])
        images = _runs(self.ids, self.processor.image_token_id)
        return SimpleNamespace(
            mm_items=[*items, *(_item("IMAGE", [offset]) for offset in images)],
            im_start_id=self.processor.vision_start_token_id,
            im_end_id=self.processor.vision_end_token_id,
        )

    def labelled(self, **kwargs: int) -> SimpleNamespace:
        """The same, as the launcher sends it."""
        inputs = self.inputs(**kwargs)
        qwen3_vl.label_items(inputs.mm_items, self.ids, self.processor.tokenizer)
        return inputs

    @property
    def prompt(self) -> list[int]:
        """With pad values, which depend on the item, in place of the placeholders."""
        pads = (self.processor.video_token_id, self.processor.image_token_id)
        return [PADS[i % 4] if i in pads else i for i in self.ids]

    def spans(self, **kwargs: int) -> list[list[tuple[int, int]]]:
        found = RULE.spans(self.labelled(**kwargs), self.prompt, image_runs=False)
        assert all(span.frames_per_step == 2 for span in found)
        return [list(span.steps) for span in found]


def _runs(ids: Sequence[int], token: int) -> list[tuple[int, int]]:
    """Inclusive at the end, as SGLang's offsets are."""
    groups = [
        [i for i, _ in group]
        for is_token, group in groupby(enumerate(ids), lambda pair: pair[1] == token)
        if is_token
    ]
    return [(group[0], group[-1]) for group in groups]


class Item(SimpleNamespace):
    """What is new to an item goes to its ``model_specific_data``, as in SGLang."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            super().__setattr__(name, value)
        else:
            self.model_specific_data[name] = value


def _item(modality: str, offsets: list | None, grid: list | None = None) -> Item:
    return Item(
        pad_values=PADS,
        modality=SimpleNamespace(name=modality),
        is_video=lambda: modality == "VIDEO",
        is_image=lambda: modality == "IMAGE",
        offsets=offsets,
        model_specific_data={} if grid is None else {"video_grid_thw": torch.tensor(grid)},
    )


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(make_tiny_model(tmp_path_factory.mktemp("model")))


def stream(processor: Any, text: str, *videos: Video, images: int = 0) -> Stream:
    """What Hugging Face's processor writes, without the pixels."""
    from transformers.video_utils import VideoMetadata

    grid = torch.tensor([[v.steps, v.height, v.width] for v in videos])
    metadata = [
        VideoMetadata(total_num_frames=v.indices[-1] + 1, fps=v.fps, frames_indices=list(v.indices))
        for v in videos
    ]
    told = {"video_grid_thw": grid, "video_metadata": metadata}
    expanded, _ = processor.get_text_with_replacements(
        [text],
        images_replacements=[6 * processor.image_token] * images,
        videos_replacements=[processor.replace_video_token(told, i) for i in range(len(videos))],
    )
    return Stream(processor, processor.tokenizer(expanded[0])["input_ids"], videos)


def check(found: Stream, **kwargs: int) -> None:
    """Spans are where the text says, and hold what they should, token by token."""
    spans = found.spans(**kwargs)
    assert spans == found.expected
    video_token = found.processor.video_token_id
    inside = [i for steps in spans for start, end in steps for i in range(start, end)]
    assert len(inside) == len(set(inside))
    assert {i for i, token in enumerate(found.ids) if token == video_token} <= set(inside)
    decode = found.processor.tokenizer.decode
    for steps, shape in zip(spans, found.videos, strict=True):
        pads = shape.height * shape.width // 4 * BARE
        for j, (start, end) in enumerate(steps):
            first, last = (
                shape.indices[2 * j],
                shape.indices[min(2 * j + 1, len(shape.indices) - 1)],
            )
            seconds = (first / shape.fps + last / shape.fps) / 2
            whole = f"<{seconds:.1f} seconds><|vision_start|>{pads}<|vision_end|>"
            text = decode(found.ids[start:end])
            if text != whole:
                shared = decode(found.ids[start - 1 : start])
                assert j == 0
                assert (shared[-1:] + text, len(shared) > 1) == (whole, True)


# --- Streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [VIDEO, BARE])
def test_lengths(processor: Any, wrapped: str) -> None:
    """The timestamps of one video differ in length."""
    for frames in range(1, 301):
        shape = video(
            frames, *((2, 2), (4, 2), (2, 6))[frames % 3], every=frames % 7 + 1, fps=29.97
        )
        check(stream(processor, f"Look: {wrapped}What?", shape))


@pytest.mark.parametrize("text", ["", "{}", "{}{}", "{} {}", "yes.{}no.{}?", "<{}<9.7 seconds>{}"])
@pytest.mark.parametrize("wrapped", [VIDEO, BARE])
@pytest.mark.parametrize("clip", [1, 2, 9])
def test_text_around_videos(processor: Any, text: str, wrapped: str, clip: int) -> None:
    videos = (video(5, 4, 6, every=3), video(8, 6, 2, every=40))[: text.count("{}")]
    check(stream(processor, text.replace("{}", wrapped), *videos), clip=clip)


def test_a_token_shared_with_the_text_before_is_outside(processor: Any) -> None:
    found = stream(processor, f"yes.{BARE}", video(2))
    [[(start, _)]] = found.spans()
    assert processor.tokenizer.decode(found.ids[:start]) == "yes.<"


def test_the_template_s_own_wrapper_is_outside(processor: Any) -> None:
    found = stream(processor, f"yes.{VIDEO}no", video(4))
    [steps] = found.spans()
    before, after = found.ids[: steps[0][0]], found.ids[steps[-1][1] :]
    assert processor.tokenizer.decode(before) == "yes.<|vision_start|>"
    assert processor.tokenizer.decode(after) == "<|vision_end|>no"


@pytest.mark.parametrize("parts", [(VIDEO, IMAGE), (IMAGE, BARE), (IMAGE, VIDEO, "then", IMAGE)])
def test_images_beside_a_video(processor: Any, parts: tuple[str, ...]) -> None:
    found = stream(processor, "".join(parts), video(6, 4, 4), images=parts.count(IMAGE))
    check(found)
    runs = RULE.spans(found.labelled(), found.prompt, image_runs=True)
    assert sum(span.image_run for span in runs) == parts.count(IMAGE)


shapes = st.builds(
    video,
    st.integers(1, 9),
    st.sampled_from([2, 4, 10]),
    st.sampled_from([2, 6]),
    st.integers(1, 5000),
    st.sampled_from([0.5, 1.0, 12.5, 23.976, 30.0, 60.0]),
)
words = st.sampled_from(["", " ", "yes.", "<", "<0.2 seconds>", "1", "\n", "é", "観る", IMAGE])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(words, shapes, st.sampled_from([VIDEO, BARE])), max_size=4),
    words,
    st.integers(1, 5),
)
def test_any_stream(processor: Any, parts: list, end: str, clip: int) -> None:
    """However a video is cut into clips."""
    text = "".join(before + wrapped for before, _, wrapped in parts) + end
    videos = [shape for _, shape, _ in parts]
    found = stream(processor, text, *videos, images=text.count(IMAGE))
    check(found)
    assert found.spans(clip=clip) == found.spans()


def test_golden(processor: Any) -> None:
    """The stream and the spans, to be read."""
    text = SYSTEM + user(f"First {VIDEO}yes.{BARE}and {IMAGE}?")
    found = stream(processor, text, video(5, 4, 6, every=20, fps=4.0), video(4, 2, 4), images=1)
    names = {processor.video_token_id: "pads", processor.image_token_id: "image pads"}
    assert describe(processor.tokenizer, found.ids, found.spans(), names) == GOLDEN.read_text()


# --- Refusals ------------------------------------------------------------------------------------


def refused_label(found: Stream, inputs: Any = None, ids: list[int] | None = None) -> str:
    """In the launcher, HTTP 400."""
    inputs = inputs or found.inputs()
    with pytest.raises(ValueError, match="expected") as error:
        qwen3_vl.label_items(inputs.mm_items, ids or found.ids, found.processor.tokenizer)
    return str(error.value)


def refused_span(found: Stream, ids: list[int] | None = None) -> str:
    """In the scheduler, HTTP 400."""
    with pytest.raises(FrameSpanError) as error:
        RULE.spans(found.labelled(), found.prompt if ids is None else ids, image_runs=False)
    return str(error.value)


@pytest.fixture
def three_steps(processor: Any) -> Stream:
    return stream(processor, f"Look: {VIDEO}What?", video(6, 4, 4))


@pytest.mark.parametrize(
    ("offsets", "grid", "message"),
    [
        (None, [[1, 4, 4]], "video item: expected offsets, got none"),
        ([(5, 8)], None, "expected video_grid_thw, got none"),
        ([(5, 8)], [[2, 4, 4]], "a video of [2] steps in video_grid_thw, got 1"),
        ([(5, 8), (20, 23)], [[1, 4, 4]], "a video of [1] steps in video_grid_thw, got 2"),
        ([(5, 8)], [[1, 4, 4], [0, 4, 4]], "a video of [1, 0] steps in video_grid_thw, got 1"),
    ],
)
def test_items_that_do_not_fit(
    three_steps: Stream, offsets: list | None, grid: list | None, message: str
) -> None:
    inputs = three_steps.inputs()
    inputs.mm_items = [_item("VIDEO", offsets, grid)]
    assert message in refused_label(three_steps, inputs)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("beside", [-1, 1])
def test_no_wrapper(three_steps: Stream, step: int, beside: int) -> None:
    start, end = three_steps.inputs().mm_items[0].offsets[step]
    ids = list(three_steps.prompt)
    ids[start - 1 if beside < 0 else end + 1] = 20
    assert f"video step at [{start}, {end + 1}): expected the opening token" in refused_span(
        three_steps, ids
    )


def test_prompt_cut_short(three_steps: Stream) -> None:
    end = three_steps.spans()[0][-1][1]
    assert f"in the prompt of {end - 1} tokens" in refused_span(
        three_steps, three_steps.prompt[: end - 1]
    )


@pytest.mark.parametrize("shift", [-1, 1])
def test_offsets_that_a_session_shifted_wrongly(three_steps: Stream, shift: int) -> None:
    inputs = three_steps.labelled()
    [item] = inputs.mm_items
    item.offsets = [(start + shift, end + shift) for start, end in item.offsets]
    with pytest.raises(FrameSpanError, match="its own placeholders"):
        RULE.spans(inputs, three_steps.prompt, image_runs=False)


def test_item_that_did_not_pass_the_processor(three_steps: Stream) -> None:
    with pytest.raises(FrameSpanError, match="expected a video that this server sampled itself"):
        RULE.spans(three_steps.inputs(), three_steps.prompt, image_runs=False)


@pytest.mark.parametrize(("step", "distance"), [(0, 3), (1, 0), (1, 3), (2, 0)])
def test_something_else_before_a_step(three_steps: Stream, step: int, distance: int) -> None:
    """Text between a step's end and the next timestamp: what would it belong to?"""
    at = three_steps.spans()[0][step][0] + distance
    ids = list(three_steps.ids)
    ids.insert(at, 20)
    inputs = three_steps.inputs()
    [item] = inputs.mm_items
    item.offsets = [(start + (start >= at), end + (start >= at)) for start, end in item.offsets]
    assert "expected a timestamp" in refused_label(three_steps, inputs, ids)
