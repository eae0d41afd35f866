"""InternVL3.5 without a server: token stream, frame spans, number of frames."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pevlm_sglang.errors import FrameSpanError, UnsupportedError
from pevlm_sglang.families import registry
from pevlm_sglang.families.frame_counts import FrameSettings
from pevlm_sglang.families.internvl import placeholders
from pevlm_sglang.families.internvl import spans as family
from pevlm_sglang.families.spans import SpanRule, leave_labels
from pevlm_sglang.layout import FrameSpans
from support.families import internvl as reference
from support.families.internvl import IMAGE, VIDEO
from support.families.internvl_model import CONTEXT
from support.families.internvl_upstream import processor
from support.golden import describe

GOLDEN = Path(__file__).parents[2] / "golden" / "internvl.txt"
RULE = SpanRule(family, 1)
CONFIG = SimpleNamespace(architectures=["InternVLChatModel"])
Clip = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def scheduled(output: Any, *, corrected: bool = True) -> tuple[Any, list[int]]:
    """A processor's output as the scheduler has it: pad values in place of placeholders."""
    from sglang.srt.managers.schedule_batch import MultimodalInputs
    from sglang.srt.models.internvl import InternVLChatModel

    placeholders.install("InternVLChatModel")
    inputs = MultimodalInputs.from_processor_output(output)
    pad = InternVLChatModel.pad_input_ids
    if not corrected:
        pad = pad.pevlm_original
    return inputs, list(pad(None, array("q", output.input_ids), inputs))


def spans(output: Any, *, corrected: bool = True) -> list[FrameSpans]:
    inputs, prompt = scheduled(output, corrected=corrected)
    return RULE.spans(inputs, prompt, image_runs=False)


def check_stream(output: Any, tokenizer: Any, prompt: str, images: list, videos: list) -> None:
    """Tokens and spans against the reference's text, read byte by byte."""
    expected = reference.written(tokenizer, prompt, images, videos)
    pad, context = tokenizer.convert_tokens_to_ids(["<|video_pad|>", CONTEXT])
    ids = [context if i == pad else i for i in output.input_ids]
    assert ids == expected["input_ids"][0].tolist()
    found = spans(output)
    assert [list(video.steps) for video in found] == expected["videos"]
    in_steps = [i for video in found for start, end in video.steps for i in range(start, end)]
    assert len(in_steps) == len(set(in_steps))
    assert {i for i, token in enumerate(output.input_ids) if token == pad} <= set(in_steps)
    for video in found:
        for start, end in video.steps:
            runs = [i for i in range(start, end) if output.input_ids[i] == pad]
            assert runs == list(range(runs[0], runs[-1] + 1))


# --- Token stream and spans ----------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 9, 10, 32, 99, 100, 300])
@pytest.mark.parametrize("text", [f"{VIDEO}What?", f"a {VIDEO}\n\nWhat?", f"Key{VIDEO}", VIDEO])
def test_one_video(model: Path, tokenizer: Any, clip: Clip, frames: int, text: str) -> None:
    with processor(model, pixels=False, video={"num_frames": frames}) as process:
        output = process(text, [clip()])
    check_stream(output, tokenizer, text, [], [[1] * frames])


WORDS = [
    "",
    "a",
    " ",
    "\n",
    "\n\n",
    "Key",
    "Frame",
    "Frame1: ",
    "Frame2: ",
    "?\n",
    "é",
    "<img",
    "1",
]


@given(
    st.lists(st.sampled_from([*WORDS, VIDEO, VIDEO, IMAGE]), min_size=1, max_size=9),
    st.lists(st.integers(1, 6), min_size=9, max_size=9),
)
@settings(max_examples=40, deadline=None)
def test_any_prompt(
    model: Path, tokenizer: Any, clip: Clip, parts: list[str], counts: list[int]
) -> None:
    """Videos, images and texts that look like labels, in any order."""
    counts = counts[: parts.count(VIDEO)]
    videos = [{"url": clip(seed=i % 2), "max_frames": n} for i, n in enumerate(counts)]
    pictures = [Image.new("RGB", (40, 40))] * parts.count(IMAGE)
    with processor(model, pixels=False) as process:
        output = process("".join(parts), videos, pictures)
    tiles = [[1] * count for count in counts]
    check_stream(output, tokenizer, "".join(parts), [1] * len(pictures), tiles)


@pytest.mark.parametrize(("width", "height"), [(160, 90), (90, 160), (64, 64), (210, 70)])
def test_tiles_of_a_frame_are_one_step(
    model: Path, tokenizer: Any, clip: Clip, width: int, height: int
) -> None:
    tiles = len(reference.load(Image.new("RGB", (width, height)), max_tiles=6))
    with processor(model, pixels=False, video={"num_frames": 4}) as process:
        process.sglang.VIDEO_MAX_NUM = 6
        output = process(f"{VIDEO}?", [clip(width, height)])
    check_stream(output, tokenizer, f"{VIDEO}?", [], [[tiles] * 4])
    assert len(output.mm_items[0].feature) == 4 * tiles


def test_golden_file(model: Path, tokenizer: Any, clip: Clip) -> None:
    text = f"Key{VIDEO}and{IMAGE}or {VIDEO}\n\nWhich?"
    videos = [{"url": clip(), "max_frames": 2}, {"url": clip(seed=1), "max_frames": 1}]
    with processor(model, pixels=False) as process:
        output = process(text, videos, [Image.new("RGB", (40, 40))])
    names = {"<|video_pad|>": "pads", CONTEXT: "image pads"}
    placeholders = {tokenizer.convert_tokens_to_ids(name): word for name, word in names.items()}
    steps = [video.steps for video in spans(output)]
    assert describe(tokenizer, output.input_ids, steps, placeholders) == GOLDEN.read_text()


def test_upstream_mixes_up_an_image_after_a_video(model: Path, clip: Clip) -> None:
    """Why placeholders are corrected; without it, such a request is refused."""
    with processor(model, pixels=False, video={"num_frames": 3}) as process:
        output = process(f"{VIDEO}and{IMAGE}?", [clip()], [Image.new("RGB", (40, 40))])
    assert len(spans(output)[0].steps) == 3
    with pytest.raises(FrameSpanError, match="its own placeholders"):
        spans(output, corrected=False)


# --- Refusals ------------------------------------------------------------------------------------


@pytest.fixture
def sampled(model: Path, clip: Clip) -> Any:
    with processor(model, pixels=False, video={"num_frames": 3}) as process:
        return process(f"a{VIDEO}b", [clip()])


def test_item_without_mark(sampled: Any) -> None:
    del sampled.mm_items[0].model_specific_data["pevlm_labels"]
    with pytest.raises(FrameSpanError, match="expected a video that this server sampled itself"):
        spans(sampled)


def test_item_with_another_number_of_frames(sampled: Any) -> None:
    leave_labels(sampled.mm_items[0], [(2, 3), (2, 3)])
    with pytest.raises(FrameSpanError, match=r"one offset a step \(\[2, 2\] steps\), got 3"):
        spans(sampled)


def test_prompt_that_ends_in_the_video(sampled: Any) -> None:
    inputs, prompt = scheduled(sampled)
    cut = prompt[: inputs.mm_items[0].offsets[-1][1] + 2]
    with pytest.raises(FrameSpanError, match=r"expected the opening token .* its own placeholders"):
        RULE.spans(inputs, cut, image_runs=False)


@pytest.mark.parametrize("shift", [-1, 1])
def test_offsets_that_do_not_fit(sampled: Any, shift: int) -> None:
    inputs, prompt = scheduled(sampled)
    item = inputs.mm_items[0]
    item.offsets = [(start + shift, end + shift) for start, end in item.offsets]
    with pytest.raises(FrameSpanError, match=r"the closing token .* got \[.*\] there"):
        RULE.spans(inputs, prompt, image_runs=False)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<|video_pad|>", r"expected <\|video_pad\|> only where .* \(3\), got 4"),
        (CONTEXT, "No data iterator found for token: <image>"),  # SGLang's own words
    ],
)
def test_placeholder_in_the_text(model: Path, clip: Clip, token: str, message: str) -> None:
    with (
        processor(model, pixels=False, video={"num_frames": 3}) as process,
        pytest.raises(ValueError, match=message),
    ):
        process(f"{VIDEO}{token}?", [clip()])


def test_other_language_models_are_refused() -> None:
    def rule(name: str) -> SpanRule:
        config = SimpleNamespace(
            architectures=["InternVLChatModel"], llm_config=SimpleNamespace(architectures=[name])
        )
        return registry.span_rule(config)

    assert rule("Qwen3ForCausalLM") == rule("Qwen3MoeForCausalLM") == SpanRule(family, 1)
    with pytest.raises(UnsupportedError, match="InternLM2ForCausalLM"):
        rule("InternLM2ForCausalLM")


# --- The number of frames ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fps": 2}, "video setting fps: expected one of num_frames, max_frames"),
        ({"num_frames": 0}, "num_frames: expected a whole number of more than 0, got 0"),
        ({"num_frames": True}, "num_frames: expected a whole number"),
        ({"max_frames": 31}, r"num_frames: expected at most max_frames \(31\), got"),
    ],
)
def test_bad_launch_setting(config: dict, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"--mm-process-config: {message}"):
        registry.check_launch(CONFIG, config)


def test_launch_setting() -> None:
    assert FrameSettings.of({}, (), num_frames=32) == FrameSettings(32, None, 768)
    values = {"num_frames": 64, "max_frames": 128}
    assert FrameSettings.of(values, [*values], num_frames=32) == FrameSettings(64, None, 128)
    registry.check_launch(CONFIG, values)


@pytest.mark.parametrize(
    ("wishes", "most", "expected"),
    [
        ([None], 100, [32]),
        ([None], 20, [20]),
        ([None, None], 20, [10, 10]),
        ([None, None], 0, [1, 1]),
        ([40, None], 100, [40, 32]),
        ([40, None], 50, [40, 10]),
        ([40, None, None], 43, [40, 1, 1]),
        ([5, None], 100, [5, 32]),
        ([40, 60], 100, [40, 60]),
        ([40, None], 40, None),
        ([40, 61], 100, None),
    ],
)
def test_share(wishes: list, most: int, expected: list | None) -> None:
    from pevlm_sglang.families.internvl.processor import share

    if expected is None:
        with pytest.raises(ValueError, match=f"max_frames: expected at most {most} frames in all"):
            share(wishes, 32, most)
    else:
        assert share(wishes, 32, most) == expected


def test_default_shrinks_to_the_context(
    model: Path, clip: Clip, caplog: pytest.LogCaptureFixture
) -> None:
    with processor(model, pixels=False) as process:
        process.sglang.max_context_len = 600
        output = process(f"{VIDEO}What?", [clip()])
        assert 10 < len(output.mm_items[0].offsets) < 32
        assert len(output.input_ids) + process.sglang.CONTEXT_RESERVED <= 600
        assert "in place of 32 each" in caplog.text
        with pytest.raises(ValueError, match="what the context holds"):
            process(f"{VIDEO}What?", [{"url": clip(), "max_frames": 32}])


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("text", ["", "word " * 200])
def test_default_fills_the_context(
    model: Path, clip: Clip, text: str, images: int, tiles: int
) -> None:
    """As many frames as fit beside the text, the images and the answer, and no fewer."""
    picture, few = Image.new("RGB", (1344, 448)), 9
    prompt = f"{IMAGE * images}{text}{VIDEO}"
    with processor(model, pixels=False) as process:
        process.sglang.VIDEO_MAX_NUM = tiles
        asked = {"url": clip(192, 64), "max_frames": few}
        output = process(prompt, [asked], [picture] * images)
        first, second = (start for start, _ in output.mm_items[-1].offsets[:2])
        # Each frame is counted with a label of two digits, and the placeholders as text.
        spare = few + 30
        limit = len(output.input_ids) + process.sglang.CONTEXT_RESERVED + spare
        process.sglang.max_context_len = limit
        output = process(prompt, [asked["url"]], [picture] * images)
        taken = len(output.input_ids) + process.sglang.CONTEXT_RESERVED
    assert taken <= limit < taken + (second - first) + spare
    assert len(output.mm_items[-1].offsets) >= few
