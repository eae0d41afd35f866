"""LongVILA without a server: its checkpoint, its processor, its spans and its vision path."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pevlm_sglang.errors import FrameSpanError
from pevlm_sglang.families import registry
from pevlm_sglang.families.longvila import spans as longvila
from pevlm_sglang.families.longvila.sizes import PUBLISHED
from pevlm_sglang.families.spans import SpanRule
from support.clips import whole
from support.families.longvila import (
    IMAGE,
    NUM_FRAMES,
    PATCH,
    TOKENS_PER_FRAME,
    VIDEO,
    LongVilaOracle,
    make_tiny_model,
    sample,
)

RULE = SpanRule(longvila, 1)
GOLDEN = Path(__file__).parents[2] / "golden" / "longvila.txt"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "longvila")


@pytest.fixture(scope="module")
def oracle(directory: Path) -> LongVilaOracle:
    return LongVilaOracle(directory)


@contextmanager
def processing(directory: Path, video: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """The processor's output for a prompt, on a server with this ``video`` section."""
    runtime = pytest.importorskip("sglang.srt.runtime_context")
    from sglang.srt.utils.hf_transformers_utils import get_config, get_processor

    from pevlm_sglang.families.longvila import checkpoint
    from pevlm_sglang.families.longvila.processor import LongVilaProcessor

    checkpoint.register()
    with runtime.get_context().override_server_args(
        device="cpu", mm_process_config={"video": video}
    ) as server_args:
        processor = LongVilaProcessor(
            get_config(str(directory), trust_remote_code=False),
            server_args,
            get_processor(str(directory), model_name=str(directory)),
            "default",
        )

        def run(prompt: Any, videos: Any = (), images: Any = ()) -> Any:
            request = SimpleNamespace(video_data=[*videos])
            return asyncio.run(processor.process_mm_data_async([*images], None, prompt, request))

        yield run
        processor.io_executor.shutdown()


@pytest.fixture(scope="module")
def process(directory: Path) -> Iterator[Callable[..., Any]]:
    with processing(directory, {}) as run:
        yield run


def spans(out: Any) -> list[tuple[tuple[int, int], ...]]:
    """The steps of each video, of the processor's output."""
    found = RULE.spans(out, out.input_ids, image_runs=False)
    return [video.steps for video in found]


# --- The processor -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(112, 84), (84, 112), (250, 38), (2, 6)])
def test_ids_pixels_and_spans_are_the_reference_s(
    process: Callable[..., Any], oracle: LongVilaOracle, clip: Callable[..., Path], size: Any
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 41, 3), np.uint8)
    from PIL import Image

    image = Image.fromarray(picture)
    videos = (clip(*size), clip(*size, seconds=30))
    prompt = f"One {VIDEO}{IMAGE} two:\n{VIDEO}\n\nWhy?"
    out = process(prompt, map(str, videos), [image])
    expected = oracle.inputs(prompt, videos, [image])
    assert out.input_ids == expected["input_ids"][0].tolist()
    for medium, (kind, pixels, _) in zip(whole(out.mm_items), expected["media"], strict=True):
        assert medium.kind == kind
        assert torch.equal(medium.pixels, pixels)
    assert spans(out) == [tuple(video) for video in oracle.videos(expected)]
    assert longvila.image_ranges(out) == oracle.images(expected)


@pytest.mark.parametrize("text", ["", "\n", "  \n\nWhat?"])
def test_text_after_a_video(
    process: Callable[..., Any], oracle: LongVilaOracle, clip: Callable[..., Path], text: str
) -> None:
    """A newline of the user never melts into the processor's own."""
    out = process(VIDEO + text, [str(clip())])
    assert out.input_ids == oracle.inputs(VIDEO + text, [clip()])["input_ids"][0].tolist()
    (steps,) = spans(out)
    assert (steps[0][0], steps[-1][1]) == (0, NUM_FRAMES * (TOKENS_PER_FRAME + 1))


@pytest.mark.parametrize("frames", [1, 2, 3, 23, 24, 25, 300])
def test_lengths(
    process: Callable[..., Any], oracle: LongVilaOracle, clip: Callable[..., Path], frames: int
) -> None:
    """Every placeholder lies in exactly one span, and every newline in the one before it."""
    out = process(f"a{VIDEO}b", [{"url": str(clip()), "max_frames": frames}])
    (steps,) = spans(out)
    assert len(steps) == frames
    pad, newline = oracle.tokenizer.convert_tokens_to_ids(VIDEO), oracle.newline
    for start, end in steps:
        assert out.input_ids[start:end] == [pad] * TOKENS_PER_FRAME + newline
    assert all(end == start for (_, end), (start, _) in pairwise(steps))
    assert out.input_ids.count(pad) == frames * TOKENS_PER_FRAME
    pixels = oracle.pixels(sample(clip(), frames))
    [video] = whole(out.mm_items)
    assert torch.equal(video.pixels, pixels)


def test_prompt_of_ids(
    process: Callable[..., Any], oracle: LongVilaOracle, clip: Callable[..., Path]
) -> None:
    ids = oracle.tokenizer(f"a{VIDEO}b").input_ids
    assert process(ids, [str(clip())]).input_ids == process(f"a{VIDEO}b", [str(clip())]).input_ids


@pytest.mark.parametrize(
    ("total", "video_fps", "most", "fps", "expected"),
    [
        (10, 1, 4, None, [0, 3, 6, 9]),
        (6, 1, 4, None, [0, 2, 3, 5]),  # numpy rounds halves to even
        (3, 1, 6, None, [0, 0, 1, 1, 2, 2]),
        (5, 1, 1, None, [0]),
        (100, 10, 50, 1.0, [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]),
        (100, 10, 4, 1.0, [0, 33, 66, 99]),
        (100, 10, 50, 0.1, [0, 99]),
        (11, 1, 50, 0.43, [0, 3, 6, 10]),  # both truncated, as the training loader does
        (100, 10, 1, 0.1, [0]),
        (3, 1, 50, 8.0, [0, 1, 2]),
        (1, 1, 50, 8.0, [0]),
    ],
)
def test_which_frames(
    total: int, video_fps: float, most: int, fps: float | None, expected: list[int]
) -> None:
    settings = PUBLISHED["longvila"].settings({"num_frames": most, "fps": fps})
    assert PUBLISHED["longvila"].indices(total, video_fps, settings) == expected


def test_settings_of_the_server_and_of_a_request(
    directory: Path, clip: Callable[..., Path]
) -> None:
    with processing(directory, {"num_frames": 5, "max_frames": 9}) as run:

        def frames(**wishes: Any) -> int:
            return len(run(VIDEO, [{"url": str(clip()), **wishes}]).mm_items[0].feature)

        assert [frames(), frames(max_frames=9), frames(fps=0.5), frames(fps=4)] == [5, 9, 3, 5]
        assert frames(fps=4, max_frames=8) == 8
        with pytest.raises(ValueError, match="max_frames: expected at most 9, the server's limit"):
            frames(max_frames=10)
        with pytest.raises(ValueError, match="max_pixels: expected one of fps, max_frames"):
            frames(max_pixels=100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nframes": 3}, "video setting nframes: expected one of num_frames, fps, max_frames"),
        ({"num_frames": 0}, "num_frames: expected a whole number of more than 0, got 0"),
        ({"num_frames": 2.0}, "num_frames: expected a whole number of more than 0, got 2.0"),
        ({"fps": True}, "fps: expected a number of more than 0, got True"),
        ({"max_frames": 10}, r"num_frames: expected at most max_frames \(10\), got 256"),
    ],
)
def test_bad_settings_of_the_server(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PUBLISHED["longvila"].settings(values)


@pytest.mark.parametrize(
    ("prompt", "videos", "message"),
    [
        (VIDEO + VIDEO, 1, "expected 1 of <vila/video>, one for each video, got 2"),
        ("none", 1, "expected 1 of <vila/video>, one for each video, got 0"),
        (IMAGE, 0, "expected 0 of <image>, one for each image, got 1"),
    ],
)
def test_placeholders_that_do_not_fit(
    process: Callable[..., Any], clip: Callable[..., Path], prompt: str, videos: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        process(prompt, [str(clip())] * videos)


def test_features_in_place_of_media(process: Callable[..., Any]) -> None:
    item = {"format": "precomputed_embedding", "feature": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match="processed already"):
        process(VIDEO, [item])
    with pytest.raises(ValueError, match="image_data: expected a file, URL or bytes, got a dict"):
        process(IMAGE, images=[item])


def test_tiles_of_a_single_image(tmp_path: Path) -> None:
    """Two tiles side by side and the whole; text as the reference writes it."""
    from PIL import Image

    model = make_tiny_model(tmp_path / "dynamic", image_aspect_ratio="dynamic", max_tiles=4)
    oracle = LongVilaOracle(model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 140, 3), np.uint8))
    with processing(model, {}) as run:
        alone = run(f"a{IMAGE}b", images=[image])
        pair = run(f"a{IMAGE}b{IMAGE}", images=[image, image])
    tile = f"{IMAGE * TOKENS_PER_FRAME}\n\n"
    assert alone.input_ids == [
        token for part in ("a", *[tile] * 3, "b") for token in tokens(oracle, part)
    ]
    tiles = [image.crop((0, 0, 70, 70)), image.crop((70, 0, 140, 70)), image.resize((70, 70))]
    assert torch.equal(alone.mm_items[0].feature, oracle.pixels(tiles))
    assert [item.feature.shape[0] for item in pair.mm_items] == [1, 1]
    assert longvila.image_ranges(alone) == [(1, len(alone.input_ids) - 1)]


def tokens(oracle: LongVilaOracle, text: str) -> list[int]:
    """Each newline on its own, as it stands after a frame."""
    parts = text.replace("\n", "|\n|").split("|")
    return [token for part in parts if part for token in oracle.tokenizer(part).input_ids]


# --- Spans ---------------------------------------------------------------------------------------


def item(kind: str, offsets: Any, before: Any = (), after: Any = (198,)) -> Any:
    """What the scheduler has of an image or video; lists, as messages carry them."""
    return SimpleNamespace(
        modality=SimpleNamespace(name=kind),
        is_video=lambda: kind == "VIDEO",
        is_image=lambda: kind == "IMAGE",
        offsets=offsets,
        model_specific_data={"text_before": list(before), "text_after": list(after)},
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 300), st.booleans()), min_size=1, max_size=4
    ),
    st.integers(1, 5),
    st.lists(st.just(7), max_size=2),
    st.lists(st.just(8), max_size=2),
)
def test_any_media(media: Any, tokens: int, before: list[int], after: list[int]) -> None:
    prompt: list[int] = []
    items, expected = [], []
    for gap, frames, is_video in media:
        prompt += [1] * gap
        offsets, steps = [], []
        for _ in range(frames if is_video else 1):
            start = len(prompt)
            prompt += [*before, *[10**6] * tokens, *after]
            offsets.append([start + len(before), len(prompt) - len(after) - 1])
            steps.append((start, len(prompt)))
        items.append(item("VIDEO" if is_video else "IMAGE", offsets, before, after))
        expected += [tuple(steps)] if is_video else []
    inputs = SimpleNamespace(mm_items=items)
    found = RULE.spans(inputs, prompt, image_runs=False)
    assert [video.steps for video in found] == expected
    assert all(video.frames_per_step == 1 for video in found)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (item("VIDEO", None), "video item: expected offsets, got none"),
        (item("VIDEO", [(0, 3)], after=(198, 5)), r"expected tokens \[198, 5\] beside the frame"),
        (item("VIDEO", [(0, 2)]), r"expected tokens \[198\] beside the frame \[0, 3\), got \[9\]"),
        (item("VIDEO", [(0, 8)]), r"expected tokens \[198\] beside the frame \[0, 9\), got \[\]"),
    ],
)
def test_items_that_do_not_fit(bad: Any, message: str) -> None:
    inputs = SimpleNamespace(mm_items=[bad])
    with pytest.raises(FrameSpanError, match=message):
        longvila.video_spans(inputs, [9, 9, 9, 9, 198, 9], 1)


def test_item_of_another_processor() -> None:
    bad = item("VIDEO", [(0, 3)])
    bad.model_specific_data = {}
    with pytest.raises(FrameSpanError, match="video item: expected text_before, got none"):
        longvila.video_spans(SimpleNamespace(mm_items=[bad]), [9], 1)


def test_golden(process: Callable[..., Any], oracle: LongVilaOracle, clip: Any) -> None:
    """``PEVLM_WRITE_GOLDEN=1`` writes the file anew."""
    prompt = f"<|im_start|>user\nIs {VIDEO}like {VIDEO}?<|im_end|>\n"
    videos = [{"url": str(clip()), "max_frames": 3}, {"url": str(clip()), "max_frames": 1}]
    out = process(prompt, videos)
    edges = {0, len(out.input_ids)}.union(*(step for video in spans(out) for step in video))
    names = {step: (v, s) for v, video in enumerate(spans(out)) for s, step in enumerate(video)}
    lines = []
    for start, end in pairwise(sorted(edges)):
        pads = out.input_ids[start:end].count(oracle.tokenizer.convert_tokens_to_ids(VIDEO))
        text = oracle.tokenizer.decode(list(out.input_ids[start:end])[pads:])
        where = "video {} step {}".format(*names[start, end]) if pads else "text"
        what = f"{pads} pads + " if pads else ""
        lines.append(f"[{start}, {end}) {where}  {what}{json.dumps(text)}\n")
    if os.environ.get("PEVLM_WRITE_GOLDEN"):
        GOLDEN.write_text("".join(lines))
    assert "".join(lines) == GOLDEN.read_text()


# --- The checkpoint and the model ----------------------------------------------------------------


def read(model: Path) -> Any:
    pytest.importorskip("sglang")
    from sglang.srt.utils.hf_transformers_utils import get_config

    from pevlm_sglang.families.longvila import checkpoint

    checkpoint.register()
    get_config.cache_clear() if hasattr(get_config, "cache_clear") else None
    return get_config(str(model), trust_remote_code=False)


def test_configuration_comes_from_the_directories(directory: Path) -> None:
    """The copies inside ``config.json`` are of another model here."""
    config = read(directory)
    assert config.text_config.hidden_size == 64
    geometry = config.geometry
    assert (geometry.image_size, geometry.tokens_per_frame, config.tower_layers) == (70, 9, 2)
    assert config.num_video_frames == NUM_FRAMES
    assert registry.span_rule(config) == RULE


@pytest.mark.parametrize(
    ("size", "patch", "projector", "tokens"),
    [
        (384, 14, "mlp_downsample", 196),
        (448, 14, "mlp_downsample_2x2_fix", 256),
        (448, 14, "mlp_downsample_fix", 256),
        (448, 14, "mlp_downsample_3x3_fix", 121),
    ],
)
def test_tokens_of_published_frames(size: int, patch: int, projector: str, tokens: int) -> None:
    from pevlm_sglang.families.longvila.checkpoint import VilaConfig

    config = VilaConfig(mm_projector_type=projector)
    config.vision_config = SimpleNamespace(image_size=size, patch_size=patch)
    assert config.geometry.tokens_per_frame == tokens
    assert config.num_video_frames == 256


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dynamic_s2", True),
        ("s2", True),
        ("image_aspect_ratio", "pad"),
        ("mm_vision_select_feature", "patch"),
        ("video_encoder", {"_target_": "llava.model.encoders.TSPVideoEncoder"}),
        ("video_encoder", '{"_target_": "llava.model.encoders.TSPVideoEncoder"}'),
    ],
)
def test_other_vila_models_are_refused(tmp_path: Path, setting: str, value: Any) -> None:
    make_tiny_model(tmp_path, **{setting: value})
    with pytest.raises(ValueError, match=f"VILA checkpoint: {setting}: expected "):
        read(tmp_path)


def test_text_around_frames(directory: Path) -> None:
    config = read(directory)
    assert config.frame_text("video") == ("", "\n")
    config.video_encoder = '{"start_tokens": "<v>", "end_tokens": null}'
    assert config.frame_text("video") == ("<v>", "")
    assert config.frame_text("image") == ("", "\n")


class _LanguageModel(torch.nn.Module):
    """Qwen2's place in the model, where only vision is looked at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.names: list[str] = []

    def load_weights(self, weights: Any) -> None:
        self.names += [name for name, _ in weights]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Any]]:
    """SGLang's model, loaded from a checkpoint; its vision half."""
    runtime = pytest.importorskip("sglang.srt.runtime_context")
    from safetensors.torch import load_file

    from pevlm_sglang.families.longvila import model

    monkeypatch.setattr(model, "Qwen2ForCausalLM", _LanguageModel)
    # Without a server there is neither a CPU kernel for the tower's attention nor a rank.
    ranks = {"tp_size": 1, "tp_rank": 0, "attn_tp_size": 1, "attn_tp_rank": 0}
    ranks["tp_group"] = SimpleNamespace(rank_in_group=0, world_size=1)

    def load(directory: Path) -> Any:
        files = sorted(directory.glob(model.LlavaLlamaModel.allow_patterns_overrides[0]))
        loaded = model.LlavaLlamaModel(read(directory))
        loaded.load_weights(pair for file in files for pair in load_file(file).items())
        return loaded

    with (
        runtime.get_context().override_server_args(device="cpu", mm_attention_backend="sdpa"),
        runtime.get_parallel().override(**ranks),
    ):
        yield load


@pytest.mark.parametrize(
    ("projector", "side"),
    [("mlp_downsample", 5), ("mlp_downsample_2x2_fix", 4), ("mlp_downsample_3x3_fix", 4)],
)
@pytest.mark.parametrize("frames", [1, 65])
def test_vision_features_are_the_reference_s(
    build: Any, clip: Any, tmp_path: Path, projector: str, side: int, frames: int
) -> None:
    directory = make_tiny_model(tmp_path, projector=projector, image_size=side * PATCH)
    oracle = LongVilaOracle(directory)
    pixels = oracle.pixels(sample(clip(), frames))
    with torch.no_grad():
        found = build(directory).get_image_feature([SimpleNamespace(feature=pixels)])
    expected = oracle.features(pixels).flatten(0, 1)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


def test_language_model_gets_its_weights(build: Any, directory: Path) -> None:
    from safetensors import safe_open

    with safe_open(directory / "llm" / "model.safetensors", "pt") as file:
        assert sorted(build(directory).llm.names) == sorted(file.keys())


def test_checkpoint_that_is_not_whole(build: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_tiny_model(tmp_path)
    file = directory / "mm_projector" / "model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if n != "layers.4.bias"}, file)
    with pytest.raises(ValueError, match=r"expected weights \['mm_projector.layers.4.bias'\]"):
        build(directory)
    save_file({**weights, "layers.5.bias": weights["layers.4.bias"].clone()}, file)
    with pytest.raises(ValueError, match=r"expected no weight mm_projector.layers.5.bias"):
        build(directory)
