"""attn_implementation="pevlm" on a tiny Qwen2.5-VL, against the same model under a dense mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pevlm_sglang.huggingface import Frames, pevlm_frames, register
from pevlm_sglang.layout import FrameSpans
from support.families.qwen_vl import QwenVLOracle, mrope_positions
from support.oracle import Setting
from support.tiny import make_tiny_model

STEPS, ROWS, COLUMNS = 9, 3, 4  # of tokens; a token is 2 x 2 patches
SINK, BLOCK = 4, 4  # sampled frames, two in a step
ATOL = 1e-5


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> QwenVLOracle:
    return QwenVLOracle(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def inputs(oracle: QwenVLOracle) -> dict[str, Any]:
    """A prompt of text, a video of noise, and text, as the processor would return it."""
    generator = torch.Generator().manual_seed(0)
    config = oracle.model.config
    patches = STEPS * ROWS * COLUMNS * 4

    def text(length: int) -> torch.Tensor:
        return torch.randint(20, 200, (length,), generator=generator)

    video = torch.full((STEPS * ROWS * COLUMNS,), config.video_token_id)
    start, end = torch.tensor([config.vision_start_token_id]), torch.tensor([4])
    return {
        "input_ids": torch.cat([text(11), start, video, end, text(7)])[None],
        "pixel_values_videos": torch.randn(patches, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([[STEPS, 2 * ROWS, 2 * COLUMNS]]),
        "second_per_grid_ts": [1.0],
    }


@pytest.fixture
def model(oracle: QwenVLOracle) -> Iterator[Any]:
    register()
    oracle.model.set_attn_implementation("pevlm")
    yield oracle.model
    oracle.model.set_attn_implementation("sdpa")


def spans(oracle: QwenVLOracle, inputs: dict[str, Any]) -> list[FrameSpans]:
    return [FrameSpans(tuple(steps), frames_per_step=2) for steps in oracle.videos(inputs)]


def logprobs(model: Any, oracle: QwenVLOracle, inputs: dict[str, Any], **options: Any) -> Any:
    ids = inputs["input_ids"]
    pixels = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    with torch.no_grad():
        out = model(
            input_ids=ids,
            position_ids=mrope_positions(oracle.model.config, inputs, ids[0]),
            **pixels,
            **options,
        )
    return out.logits[0].log_softmax(dim=-1), out.past_key_values


@pytest.mark.parametrize(("sink", "block"), [(SINK, BLOCK), (0, 2), (2, 6), (8, 2)])
def test_prefill_is_the_masked_model(
    oracle: QwenVLOracle, inputs: dict[str, Any], model: Any, sink: int, block: int
) -> None:
    with pevlm_frames(spans(oracle, inputs), sink_frames=sink, block_frames=block) as frames:
        found, _ = logprobs(model, oracle, inputs, use_cache=False)
    assert frames.sparse_calls == model.config.text_config.num_hidden_layers
    model.set_attn_implementation("sdpa")
    expected = oracle.logprobs(inputs, Setting(sink, block))
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    full = oracle.logprobs(inputs, None)
    assert (full - expected).abs().max() > 0.01, "the setting must make a difference"


def test_whole_video_in_the_sink_is_full_attention(
    oracle: QwenVLOracle, inputs: dict[str, Any], model: Any
) -> None:
    with pevlm_frames(spans(oracle, inputs), sink_frames=99, block_frames=2) as frames:
        found, _ = logprobs(model, oracle, inputs, use_cache=False)
    assert frames.sparse_calls == 0
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, oracle.logprobs(inputs, None), rtol=0, atol=ATOL)


def test_decode_and_chunks_go_on_from_the_cache(
    oracle: QwenVLOracle, inputs: dict[str, Any], model: Any
) -> None:
    """A cached prompt, one token, and three more at once, which is a chunk after a prefix."""
    answer = [30, 31, 32, 33]
    ids = torch.cat([inputs["input_ids"][0], torch.tensor(answer)])
    positions, n = mrope_positions(oracle.model.config, inputs, ids), len(ids) - 4
    with pevlm_frames(spans(oracle, inputs), sink_frames=SINK, block_frames=BLOCK) as frames:
        first, cache = logprobs(model, oracle, inputs, use_cache=True)
        parts = [first]
        for start, end in ((n, n + 1), (n + 1, n + 4)):
            with torch.no_grad():
                out = model(
                    input_ids=ids[None, start:end],
                    position_ids=positions[..., start:end],
                    past_key_values=cache,
                )
            parts.append(out.logits[0].log_softmax(dim=-1))
    assert frames.sparse_calls == model.config.text_config.num_hidden_layers, "the prompt alone"
    model.set_attn_implementation("sdpa")
    expected = oracle.logprobs(inputs, Setting(SINK, BLOCK), answer)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=ATOL)


def test_generate(oracle: QwenVLOracle, inputs: dict[str, Any], model: Any) -> None:
    pixels = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    ids = inputs["input_ids"]
    types = (ids == model.config.video_token_id).long() * 2
    with pevlm_frames(spans(oracle, inputs), sink_frames=SINK, block_frames=BLOCK) as frames:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            second_per_grid_ts=torch.tensor([1.0]),
            **pixels,
            max_new_tokens=3,
            do_sample=False,
        )
    assert out.shape[1] > ids.shape[1]
    assert frames.sparse_calls == model.config.text_config.num_hidden_layers


def test_two_videos_and_a_chunk_inside_a_block() -> None:
    """Plans that are no single packed sequence, against Layout.visible."""
    from pevlm_sglang.layout import Layout

    videos = [FrameSpans(tuple((a + 4 * i, a + 4 * i + 4) for i in range(4))) for a in (3, 25)]
    layout = Layout.build(videos, sink_frames=1, block_frames=2)
    for prefix, length in ((0, 45), (17, 45), (0, 33), (10, 38)):
        plan = Frames(layout, "auto").plan(prefix, length, torch.device("cpu"))
        found, row = [], 0
        for n, own in zip(plan.seqlens_q, plan.kv_indices.split(list(plan.seqlens_k)), strict=True):
            found += [set(own[: len(own) - n + 1 + i].tolist()) for i in range(n)]
            row += n
        rows = range(prefix, length)
        assert found == [{k for k in range(length) if layout.visible(q, k)} for q in rows]


# --- Errors --------------------------------------------------------------------------------------


def test_outside_the_context(oracle: QwenVLOracle, inputs: dict[str, Any], model: Any) -> None:
    with pytest.raises(RuntimeError, match="inside `with pevlm_frames"):
        logprobs(model, oracle, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 9, 16)}, "expected a batch of 1, got 2"),
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, r"no attention_mask .* got shape \(1, 1, 9"),
        ({"dropout": 0.1}, "expected no dropout, got 0.1"),
        ({"sliding_window": 8}, "got a sliding window of 8 tokens"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    from pevlm_sglang.huggingface import attention_forward

    heads = torch.zeros(1, 4, 9, 16)
    arguments = {"query": heads, "key": heads, "value": heads, "attention_mask": None, **change}
    with (
        pevlm_frames([], sink_frames=1, block_frames=1),
        pytest.raises(ValueError, match=message),
    ):
        attention_forward(torch.nn.Module(), **arguments)
