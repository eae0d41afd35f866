"""pevlm_attention on one packed sequence, and every implementation on its plan, against the mask of
the specification."""

from __future__ import annotations

import os

import pytest
import torch

from pevlm_kernels import IMPLEMENTATIONS, packed_plan, pevlm_attention, sdpa
from pevlm_kernels.choice import refusal
from pevlm_kernels.reference import masked_attention_lse
from support.kernel_calls import Call, assert_within_budget, random_call

Blocks = tuple[tuple[int, int], ...]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # a process for Triton alone: see test_triton.py
    from support.triton_interpreter import fix_bfloat16

    fix_bfloat16()
    IMPLS = ["triton"]
else:
    IMPLS = ["auto", "reference", "sdpa"]
    IMPLS += [pytest.param(f"{name} on cuda", marks=pytest.mark.gpu) for name in IMPLEMENTATIONS]


def tiled(start: int, *lengths: int) -> Blocks:
    blocks = []
    for length in lengths:
        blocks.append((start, start + length))
        start += length
    return tuple(blocks)


LAYOUTS = {
    "sink, blocks, question": (150, 20, tiled(20, 40, 40, 40)),
    "awkward blocks": (317, 63, tiled(63, 1, 63, 111, 1, 64)),
    "ragged last block": (100, 7, tiled(7, 30, 30, 13)),
    "no sink": (90, 0, tiled(0, 30, 30, 20)),
    "no question": (90, 10, tiled(10, 40, 40)),
    "one block": (90, 10, tiled(10, 40)),
    "one block, no question": (90, 10, tiled(10, 80)),
    "no blocks": (90, 30, ()),
    "all sink": (90, 90, ()),
    "300 blocks": (620, 8, tiled(8, *[2] * 300)),
    "one token": (1, 0, ((0, 1),)),
}


def spec(length: int, sink_end: int, blocks: Blocks) -> torch.Tensor:
    """``[length, length]`` bool, equations (2) to (4) of the paper."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for start, end in blocks:
        mask[start:end, sink_end:start] = False
    return mask


def packed_call(length: int, sink_end: int, blocks: Blocks, **options: object) -> Call:
    plan = packed_plan(length, sink_end, blocks, torch.device("cpu"))
    return random_call(plan, spec(length, sink_end, blocks), **options)


def fit_tiles(q: torch.Tensor, blocks: Blocks) -> None:
    """The interpreter takes its time for each operation and each number in it: few large tiles for
    long blocks, small ones for many short blocks. The other layouts keep those of a GPU."""
    from pevlm_kernels import triton_prefill

    longest = max((end - start for start, end in blocks), default=0)
    of_gpu = triton_prefill.candidates(q.shape[2], q.dtype, triton_prefill.LARGE_BYTES)[0]
    sizes = {4096: (512, 512), 2: (16, 16)}.get(longest, of_gpu[:2])
    triton_prefill._tuned[0, q.shape[2], q.dtype] = of_gpu._replace(
        block_m=sizes[0], block_n=sizes[1]
    )


def attention(
    call: Call, impl: str, sink_end: int, blocks: Blocks, **options: object
) -> torch.Tensor:
    name, _, device = impl.partition(" on ")
    q, k, v = (part.to(device or "cpu") for part in (call.q, call.k_cache, call.v_cache))
    if device and (reason := refusal(name, q, k, v)):
        pytest.skip(reason)
    if INTERPRETED:
        fit_tiles(q, blocks)
    return pevlm_attention(q, k, v, sink_end=sink_end, blocks=blocks, impl=name, **options).cpu()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_within_budget(impl: str, layout: tuple, dtype: torch.dtype) -> None:
    heads = 2 if len(layout[2]) > 100 else 4
    call = packed_call(*layout, num_q_heads=heads, num_kv_heads=1, dtype=dtype, seed=layout[1])
    assert_within_budget(attention(call, impl, *layout[1:]), call)


@pytest.mark.parametrize("impl", IMPLS)
def test_block_of_4096(impl: str) -> None:
    layout = (64 + 2 + 4096 + 8, 64, tiled(64, 2, 4096))
    call = packed_call(*layout, num_q_heads=1, num_kv_heads=1, head_dim=64)
    assert_within_budget(attention(call, impl, *layout[1:]), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [sdpa.MERGED_BYTES, 1])
def test_merge_of_two_sets_of_keys(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int
) -> None:
    """Half of the keys and the other half give what all of them give; weights far apart too."""
    monkeypatch.setattr(sdpa, "MERGED_BYTES", at_once)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(77, 3, 80, generator=generator).to(dtype) for _ in range(3))
    k[:40] += torch.linspace(0, 30, 40).to(dtype)[:, None, None]
    every = torch.ones(77, 77, dtype=torch.bool)
    expected, expected_lse = masked_attention_lse(q, k, v, every, softmax_scale=0.3)
    (out, lse), (other, other_lse) = (
        masked_attention_lse(q, k[half], v[half], every[:, half], softmax_scale=0.3)
        for half in (slice(40), slice(40, 77))
    )
    wide = torch.full((6, 77), torch.nan)
    wide[::2] = lse
    sdpa.merge_states(out, wide[::2], other, other_lse)
    # A log-sum-exp of 100 is known to 1e-5, and so is the weight that it gives.
    tolerance = max(4 * torch.finfo(dtype).eps, 3e-5)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(wide[::2], expected_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_full_sequences_see_everything_before_them(layout: tuple) -> None:
    plan = packed_plan(*layout, torch.device("cpu"))
    ends = torch.tensor(plan.seqlens_q).cumsum(0).tolist()
    assert plan.full == tuple(m == end for m, end in zip(plan.seqlens_k, ends, strict=True))


@pytest.mark.parametrize("blocks", [(), ((10, 50),), ((10, 90),)])
def test_full_attention_is_one_sequence(blocks: Blocks) -> None:
    assert packed_plan(90, 10, blocks, torch.device("cpu")).seqlens_k == (90,)


def test_plan_is_kept_for_the_next_layer() -> None:
    plans = [packed_plan(90, 10, ((10, 50),), torch.device("cpu")) for _ in range(2)]
    assert plans[0] is plans[1]


@pytest.mark.parametrize(
    ("length", "sink_end", "blocks", "message"),
    [
        (9, 10, (), "sink_end: expected 0 <= sink_end <= 9, got 10"),
        (9, -1, (), "sink_end: expected 0 <= sink_end <= 9, got -1"),
        (9, 2, ((3, 5),), r"blocks\[0\]: expected a block that starts at 2.* got \(3, 5\)"),
        (9, 2, ((2, 5), (4, 6)), r"blocks\[1\]: expected a block that starts at 5"),
        (9, 2, ((2, 5), (6, 7)), r"blocks\[1\]: expected a block that starts at 5"),
        (9, 2, ((2, 2),), r"blocks\[0\]: .* ends after its start"),
        (9, 2, ((2, 10),), r"blocks\[0\]: .* at most at 9, got \(2, 10\)"),
        (9, 2, ((2, 3, 4),), r"blocks: expected \(start, end\), got \(2, 3, 4\)"),
    ],
)
def test_refuses_blocks_that_do_not_tile(
    length: int, sink_end: int, blocks: tuple, message: str
) -> None:
    q = torch.zeros(length, 2, 16)
    with pytest.raises(ValueError, match=message):
        pevlm_attention(q, q, q, sink_end=sink_end, blocks=blocks)


def test_refuses_tensors_that_do_not_fit() -> None:
    q = torch.zeros(9, 2, 16)
    with pytest.raises(ValueError, match=r"k: expected \[length, heads, head_dim\] of one length"):
        pevlm_attention(q, q[:8], q, sink_end=2, blocks=())
    with pytest.raises(ValueError, match=r"v: expected .* got \(9, 2\)"):
        pevlm_attention(q, q, q[..., 0], sink_end=2, blocks=())
    with pytest.raises(ValueError, match="expected a multiple of 2 key-value heads, got 3"):
        pevlm_attention(torch.zeros(9, 3, 16), q, q, sink_end=2, blocks=())
