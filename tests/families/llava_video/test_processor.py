"""LLaVA-Video without a server: the processor and the features against the reference."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pevlm_sglang.families.llava_video import spans as llava_video
from pevlm_sglang.families.llava_video.spans import ENDS
from pevlm_sglang.layout import FrameSpans
from support.clips import whole
from support.families.llava_video import LlavaVideoOracle, frames_of, pixels_of
from support.families.llava_video_tiny import PLACEHOLDER_ID, make_tiny_model

GOLDEN = Path(__file__).parents[2] / "golden" / "llava_video.txt"
LAYOUTS = [
    ("grid", "bilinear"),
    ("grid", "average"),
    ("frame", "bilinear"),
    ("one_token", "max"),
    ("no_token", "bilinear"),
]  # newline, pooling


def spans(*items: Any) -> list[FrameSpans]:
    return llava_video.video_spans(SimpleNamespace(mm_items=items), (), 1)


# --- The processor, against the reference --------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="module")
def oracle(directory: Path) -> LlavaVideoOracle:
    return LlavaVideoOracle(directory)


@pytest.fixture(scope="module")
def process(directory: Path) -> Iterator[Callable[..., Any]]:
    """The processor's output for a prompt; the checkpoint has no processor files."""
    runtime = pytest.importorskip("sglang.srt.runtime_context")
    from sglang.srt.utils.hf_transformers_utils import get_processor
    from transformers import AutoConfig

    from pevlm_sglang.families.llava_video.checkpoint import load_processor
    from pevlm_sglang.families.llava_video.processor import LlavaVideoProcessor

    hf_processor = load_processor(get_processor, str(directory), model_name=str(directory))
    with runtime.get_context().override_server_args(
        device="cpu", dtype="float32", mm_process_config={}
    ):
        processor = LlavaVideoProcessor(
            AutoConfig.from_pretrained(directory),
            SimpleNamespace(dtype="float32"),
            hf_processor,
            "default",
        )

        def run(
            prompt: str | list[int],
            videos: Sequence[Any] = (),
            images: Sequence[Any] = (),
            modalities: Any = None,
        ) -> Any:
            request = SimpleNamespace(video_data=list(videos), modalities=modalities)
            return asyncio.run(processor.process_mm_data_async(list(images), None, prompt, request))

        yield run


BACKEND = "image_processor_backend"


@pytest.mark.parametrize("asked", [None, "auto", "pil", "torchvision"])
def test_pil_resizes_where_nobody_says_otherwise(
    directory: Path, tmp_path: Path, asked: str | None
) -> None:
    from sglang.srt.utils.hf_transformers_utils import get_processor

    from pevlm_sglang.families.llava_video.checkpoint import load_processor

    found = load_processor(
        get_processor, str(directory), model_name=str(directory), **{BACKEND: asked}
    )
    is_pil = type(found.image_processor).__name__.endswith("Pil")
    assert is_pil == (asked != "torchvision")
    # A checkpoint with processor files: SGLang loads it, and would take auto as it likes.
    (tmp_path / "preprocessor_config.json").write_text("{}")
    given = load_processor(lambda path, **options: options, str(tmp_path), **{BACKEND: asked})
    assert given[BACKEND] == ("torchvision" if asked == "torchvision" else "pil")


def check_ids_and_pixels(out: Any, inputs: Any, pixels: list[torch.Tensor]) -> None:
    assert out.input_ids == inputs["input_ids"][0].tolist()
    for found, expected in zip(whole(out.mm_items), pixels, strict=True):
        torch.testing.assert_close(found.pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 16, 17, 63, 300])
@pytest.mark.parametrize("size", [(112, 84), (84, 112), (186, 50)])
def test_video_as_in_the_reference(
    process: Any, oracle: LlavaVideoOracle, clip: Any, frames: int, size: tuple[int, int]
) -> None:
    path = clip(*size)
    out = process("Look: <video>What?", [{"url": str(path), "max_frames": frames}])
    inputs = oracle.inputs("Look: <video>What?", [path], max_frames=frames)
    pixels = torch.stack([pixels_of(frame) for frame in frames_of(path, frames)])
    check_ids_and_pixels(out, inputs, [pixels])
    [video] = spans(*out.mm_items)
    assert [*video.steps] == oracle.videos(inputs)[0]
    inside = [i for i, token in enumerate(out.input_ids) if token == PLACEHOLDER_ID]
    assert [i for start, end in video.steps for i in range(start, end)] == inside


@pytest.mark.parametrize(
    "text", ["<video>", "<video><video>", "a<video>b<video>", "<image><image>"]
)
def test_videos_and_empty_text(
    process: Any, oracle: LlavaVideoOracle, clip: Any, text: str
) -> None:
    paths = [clip(), clip(84, 112)][: text.count("<")]
    out = process(text, [{"url": str(path), "max_frames": 3} for path in paths])
    inputs = oracle.inputs(text.replace("<image>", "<video>"), paths, max_frames=3)
    assert out.input_ids == inputs["input_ids"][0].tolist()
    assert [[*video.steps] for video in spans(*out.mm_items)] == oracle.videos(inputs)


def test_tokens_instead_of_text(process: Any, clip: Any) -> None:
    wish = [{"url": str(clip()), "max_frames": 2}]
    out = process([5, PLACEHOLDER_ID, 6, 7], wish)
    assert out.input_ids == [5, *[PLACEHOLDER_ID] * 24, 6, 7]
    assert out.mm_items[0].offsets == [(1, 24)]


@pytest.mark.parametrize(
    "size",
    # The last two become 1.06 and 1.15 times as many features a side as nine tiles have.
    [(112, 84), (60, 200), (70, 70), (420, 371), (210, 238), (210, 280)],
)
def test_picture_alone(process: Any, oracle: LlavaVideoOracle, size: tuple[int, int]) -> None:
    image = picture(*size)
    out = process("<image>What?", images=[image], modalities=["image"])
    assert out.input_ids == oracle.inputs("<image>What?", (), [image])["input_ids"][0].tolist()


def test_list_of_frames_and_pictures(process: Any, oracle: LlavaVideoOracle) -> None:
    images = [picture(112, 84, seed) for seed in range(3)]
    text = "<image>\n<image>\n<image>\nWhat?"
    out = process(text, images=images, modalities=["video"] * 3)
    inputs = oracle.inputs(text, (), images, listed=True)
    check_ids_and_pixels(out, inputs, [pixels_of(image)[None] for image in images])
    assert [[*video.steps] for video in spans(*out.mm_items)] == oracle.videos(inputs)
    for said in ("multi-images", ["image"] * 3):
        out = process(text, images=images, modalities=said)
        assert out.input_ids == oracle.inputs(text, (), images)["input_ids"][0].tolist()
        assert spans(*out.mm_items) == []


def test_a_frame_and_a_picture_are_known_apart(process: Any) -> None:
    """The same pixels, another number of tokens: caches must not take one for the other."""
    image = picture(70, 70)
    frame, other = (
        process("<image><image>", images=[image, image], modalities=[kind] * 2).mm_items[0]
        for kind in ("video", "multi-images")
    )
    assert torch.equal(frame.feature, other.feature)
    assert frame.hash != other.hash


@pytest.mark.parametrize(
    ("prompt", "media", "message"),
    [
        ("What?", {"videos": ["x.mp4"]}, "expected 1 of <video>, one for each video, got 0"),
        ("<image>", {}, "expected 0 of <image>, one for each image, got 1"),
        ("<video>", {"videos": [{"format": "processor_output"}]}, "processed already"),
        ("<video>", {"videos": [{"url": "x", "max_pixels": 9}]}, "max_pixels: expected one of fps"),
        ("<video>", {"videos": [{"url": "x", "max_frames": 769}]}, "at most 768, the server's"),
    ],
)
def test_refusals(process: Any, prompt: str, media: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process(prompt, **media)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


# --- Features ------------------------------------------------------------------------------------


class _Language(torch.nn.Module):
    """Stands in for SGLang's Qwen2, which needs a server around it."""

    def __init__(self, hf_config: Any, **_: Any) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(1, hf_config.hidden_size)

    def load_weights(self, weights: Any) -> None:
        assert all(name.startswith(("model.", "lm_head.")) for name, _ in weights)


@pytest.fixture
def model(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, LlavaVideoOracle]:
    """SGLang's model, corrected, with the weights of a checkpoint; and its oracle."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    upstream = pytest.importorskip("sglang.srt.models.llava")
    from pevlm_sglang.families.llava_video.model import LlavaQwenForCausalLM

    monkeypatch.setattr(upstream, "Qwen2ForCausalLM", _Language)
    newline, pool_mode = request.param
    path = make_tiny_model(tmp_path / "model", newline=newline, pool_mode=pool_mode)
    corrected = LlavaQwenForCausalLM(AutoConfig.from_pretrained(path))
    corrected.load_weights(iter(load_file(path / "model.safetensors").items()))
    return corrected, LlavaVideoOracle(path)


@pytest.mark.parametrize("model", LAYOUTS, indirect=True)
def test_features_of_videos_and_pictures(model: tuple[Any, LlavaVideoOracle]) -> None:
    corrected, oracle = model
    frames = [picture(112, 84, seed) for seed in range(18)]  # more than the tower takes at once
    pixels = torch.stack([pixels_of(frame) for frame in frames])
    items = [
        SimpleNamespace(feature=pixels[:5], model_specific_data={ENDS: False}),
        SimpleNamespace(feature=pixels[5:], model_specific_data={ENDS: True}),
        SimpleNamespace(feature=pixels[:1], model_specific_data={}),
    ]
    expected = torch.cat([oracle.video(frames), oracle.video(frames[:1])])
    with torch.no_grad():
        found = corrected.get_video_feature(items)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(found[:9], expected[9:18], atol=1e-2)
    for parameter in corrected.parameters():
        assert parameter.dtype == torch.float32


# --- A golden file -------------------------------------------------------------------------------


def test_golden_token_stream(process: Any, clip: Any, oracle: LlavaVideoOracle) -> None:
    """A frame is three rows of three features and a newline; a picture beside others 25 features
    and a newline."""
    wish = [{"url": str(clip()), "max_frames": 3}]
    images = [picture(112, 84, seed) for seed in range(2)]
    cases = {
        "a video of 3 frames": process("See: <video>Why?", wish),
        "a picture beside it": process("<image>\n<video>?", wish, images[:1]),
        "a list of 2 frames": process("<image>\n<image>\n?", (), images, ["video"] * 2),
    }
    lines = []
    for title, out in cases.items():
        lines += [f"# {title}", *_runs(out, oracle.tokenizer)]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()


def _runs(out: Any, tokenizer: Any) -> Iterator[str]:
    steps = [step for video in spans(*out.mm_items) for step in video.steps]
    places = {start: (end, f"step {i}") for i, (start, end) in enumerate(steps)}
    inputs = SimpleNamespace(mm_items=out.mm_items)
    places |= {start: (end, "picture") for start, end in llava_video.image_ranges(inputs)}
    at = 0
    while at < len(out.input_ids):
        after = min((start for start in places if start > at), default=len(out.input_ids))
        end, what = places.get(at, (after, "text"))
        assert (set(out.input_ids[at:end]) == {PLACEHOLDER_ID}) == (what != "text")
        text = repr(tokenizer.decode(out.input_ids[at:end])) if what == "text" else ""
        yield f"[{at}, {end}) {what}  {text or f'{end - at} placeholders'}"
        at = end
