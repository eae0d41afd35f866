"""pevlm_prefill against dense masks: from random virtual sequences, and from the specification."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_oracle import Video, write
from torch.utils._python_dispatch import TorchDispatchMode

from attention.test_plan import Batch, batches, make_batch
from pevlm_kernels import IMPLEMENTATIONS, PrefillPlan, pevlm_prefill
from pevlm_kernels.choice import refusal
from support.kernel_calls import (
    Call,
    assert_within_budget,
    plain_attention,
    plan_of_slots,
    random_call,
    random_plan,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # a process for Triton alone: see test_triton.py
    from support.triton_interpreter import fix_bfloat16

    fix_bfloat16()
    HERE = ["triton"]
    IMPLS = HERE
else:
    HERE = ["reference", "sdpa"]
    ON_GPU = [pytest.param(f"{name} on cuda", marks=pytest.mark.gpu) for name in IMPLEMENTATIONS]
    IMPLS = HERE + ON_GPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = [
    pytest.param(2, 2, id="MHA"),
    pytest.param(4, 2, id="GQA 2"),
    pytest.param(14, 2, id="GQA 7"),
    pytest.param(16, 2, id="GQA 8"),
    pytest.param(6, 1, id="MQA"),
]
AWKWARD = [(1, 1), (1, 63), (63, 63), (111, 111), (113, 203), (2, 3)]


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that a kernel forgets to write is NaN, and not what the last test left there."""
    for name in ("empty_like", "empty"):
        original = getattr(torch, name)

        def poisoned(*args: object, original: object = original, **kwargs: object) -> torch.Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


def run(call: Call, impl: str, **options: object) -> torch.Tensor:
    """An implementation's output on the CPU, for a call that lies there; with ``return_lse`` the
    log-sum-exp too."""
    name, _, device = impl.partition(" on ")
    on = call.to(device) if device else call
    if device and (reason := refusal(name, on.q, on.k_cache, on.v_cache)):
        pytest.skip(reason)
    options = {"softmax_scale": call.softmax_scale, **options}
    result = pevlm_prefill(on.q, on.k_cache, on.v_cache, on.plan, impl=name, **options)
    return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


def batch_call(batch: Batch, **options: object) -> Call:
    """A call for a batch of layouts; its mask comes from the oracle's keys, not from the plan."""
    expected = batch.expected()
    mask = torch.zeros(len(expected), batch.req_to_token.numel(), dtype=torch.bool)
    for row, slots in enumerate(expected):
        mask[row, list(slots)] = True
    return random_call(batch.plan, mask, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
def test_head_ratios(impl: str, dtype: torch.dtype, q_heads: int, kv_heads: int) -> None:
    plan, mask = random_plan(AWKWARD, num_slots=240)
    call = random_call(plan, mask, num_q_heads=q_heads, num_kv_heads=kv_heads, dtype=dtype)
    assert_within_budget(run(call.poisoned(), impl), call)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(impl: str, dtype: torch.dtype, head_dim: int) -> None:
    plan, mask = random_plan(AWKWARD, num_slots=240, seed=1)
    call = random_call(plan, mask, head_dim=head_dim, dtype=dtype, seed=1)
    assert_within_budget(run(call.poisoned(), impl), call)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", AWKWARD, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_shape(impl: str, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """One shape alone, so that another cannot lend it its budget. Some copies of it: the largest
    error of a few numbers is a matter of luck."""
    copies = 16 if lengths[0] < 10 else 2
    plan, mask = random_plan([lengths] * copies, num_slots=lengths[1] + 7, seed=2)
    call = random_call(plan, mask, dtype=dtype, seed=2)
    assert_within_budget(run(call.poisoned(), impl), call)


@pytest.mark.parametrize("impl", IMPLS)
def test_fp64_is_exact_to_fp64(impl: str) -> None:
    if INTERPRETED:
        pytest.skip("triton takes up to fp32")
    plan, mask = random_plan(AWKWARD, num_slots=240, seed=3)
    call = random_call(plan, mask, dtype=torch.float64, seed=3)
    exact = plain_attention(call, torch.float64)
    torch.testing.assert_close(run(call, impl), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["cached", "own"])
def test_one_side_outweighs_the_other(impl: str, dtype: torch.dtype, side: str) -> None:
    """Log-sum-exps far apart: the weight of one part underflows and must not turn into NaN."""
    n, m = 20, 60
    mask = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    call = random_call(plan_of_slots([n], [torch.arange(m)]), mask, dtype=dtype, seed=4)
    heavy = slice(0, m - n) if side == "cached" else slice(m - n, m)
    k_cache = call.k_cache.clone()
    k_cache[heavy] += 20  # scores of about 130 against queries without a negative number
    call = dataclasses.replace(call, q=call.q.abs(), k_cache=k_cache)
    assert_within_budget(run(call, impl), call)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [None, 0.02, 1.0])
def test_softmax_scale(impl: str, scale: float | None) -> None:
    plan, mask = random_plan([(7, 19)], num_slots=20, seed=5)
    call = random_call(plan, mask, head_dim=80, seed=5)
    out = pevlm_prefill(call.q, call.k_cache, call.v_cache, plan, softmax_scale=scale, impl=impl)
    assert_within_budget(
        out, dataclasses.replace(call, softmax_scale=80**-0.5 if scale is None else scale)
    )


@pytest.mark.parametrize("impl", ["triton"] if INTERPRETED else ["reference"])
def test_values_of_another_width(impl: str) -> None:
    plan, mask = random_plan([(7, 19)], num_slots=20)
    call = random_call(plan, mask, head_dim=64, head_dim_v=32)
    out = run(call.poisoned(), impl)
    assert out.shape[-1] == 32
    assert_within_budget(out, call)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp(impl: str, dtype: torch.dtype) -> None:
    plan, mask = random_plan(AWKWARD, num_slots=240, seed=8)
    call = random_call(plan, mask, num_q_heads=6, num_kv_heads=3, dtype=dtype, seed=8)
    out, lse = run(call.poisoned(), impl, return_lse=True)
    assert torch.equal(out, run(call, impl))
    keys = call.k_cache.double().repeat_interleave(2, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", call.q.double(), keys) * call.softmax_scale
    exact = scores.masked_fill(~mask, -torch.inf).logsumexp(dim=-1)
    # The scores themselves may be rounded: to fp32, or to the dtype by PyTorch on some CPUs.
    tolerance = 4 * torch.finfo(torch.float32 if impl != "sdpa" else dtype).eps
    torch.testing.assert_close(lse.double(), exact, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache_with_scales(impl: str, stored: torch.dtype) -> None:
    """The stored numbers times the scales are what is attended to."""
    plan, mask = random_plan(AWKWARD, num_slots=240, seed=9)
    call = random_call(plan, mask, dtype=torch.bfloat16, seed=9)
    k8, v8 = (cache.to(stored) for cache in (call.k_cache, call.v_cache))
    scales = {"k_scale": 0.5, "v_scale": 2.0}
    out = run(dataclasses.replace(call, k_cache=k8, v_cache=v8), impl, **scales)
    read = dataclasses.replace(call, k_cache=k8.bfloat16() * 0.5, v_cache=v8.bfloat16() * 2)
    assert_within_budget(out, read)


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_beyond_31_bits(impl: str, tmp_path: Path) -> None:
    """Rows and heads more than 2**31 elements apart; on the CPU in a file with nothing between."""
    heads_apart, rows_apart = 2**30 + 8192, 2**29 + 32
    plan, mask = random_plan([(3, 5), (2, 2)], num_slots=6, seed=10)
    call = random_call(plan, mask, num_q_heads=3, num_kv_heads=3, dtype=torch.float16, seed=10)
    far = {}
    for name in ("q", "k_cache", "v_cache"):
        near = getattr(call, name)
        elements = 2 * heads_apart + near.shape[0] * rows_apart
        if "cuda" in impl:
            storage = torch.zeros(elements, dtype=near.dtype, device="cuda")
        else:
            file = str(tmp_path / name)
            storage = torch.from_file(file, shared=True, size=elements, dtype=near.dtype)
        far[name] = storage.as_strided(near.shape, (rows_apart, heads_apart, 1))
        far[name].copy_(near)
        assert min(2 * heads_apart, (near.shape[0] - 1) * rows_apart) > 2**31
    assert torch.equal(run(dataclasses.replace(call, **far), impl), run(call, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl: str) -> None:
    """q is a slice of the fused projection, the cache one layer of a larger buffer."""
    plan, mask = random_plan([(7, 19), (3, 3)], num_slots=20)
    call = random_call(plan, mask)
    fused = torch.full((10, 8, 64), torch.nan)
    fused[:, :4] = call.q
    buffer = torch.full((20, 4, 64), torch.nan)
    buffer[:, 2:] = call.k_cache
    strided = dataclasses.replace(call, q=fused[:, :4], k_cache=buffer[:, 2:])
    assert not strided.q.is_contiguous()
    assert not strided.k_cache.is_contiguous()
    assert torch.equal(run(strided, impl), run(call, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_plan(impl: str) -> None:
    plan, mask = random_plan([], num_slots=5)
    out, lse = run(random_call(plan, mask), impl, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (4, 0))


# --- From the specification ----------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@given(batch=batches(), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_batches_of_layouts(impl: str, batch: Batch, seed: int) -> None:
    """Slots that the specification hides from every token of the forward hold NaN."""
    dtype, tolerance = (torch.float32, 1e-5) if INTERPRETED else (torch.float64, 1e-13)
    call = batch_call(batch, head_dim=16, dtype=dtype, seed=seed)
    exact = plain_attention(call, torch.float64).to(dtype)
    torch.testing.assert_close(run(call.poisoned(), impl), exact, rtol=0, atol=tolerance)


def video_batch() -> Batch:
    """A sparse prompt from its third block on, text, an image run, a decode row."""
    video = write(5, Video((6,) * 9), 4)
    images = write(2, Video((5, 3, 4, 6), gaps=(2, 0, 3)), 3)
    requests = [(video, 24, 39), (write(11), 0, 11), (images, 0, 28), (video, 62, 1)]
    return make_batch(requests, sink=1, block=2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_video_batch_is_within_budget(impl: str, dtype: torch.dtype) -> None:
    call = batch_call(video_batch(), num_q_heads=14, num_kv_heads=2, dtype=dtype)
    assert (~call.mask.any(dim=0)).sum() > 20, "nothing to poison"
    assert_within_budget(run(call.poisoned(), impl), call)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_order_changes_no_bit(impl: str, dtype: torch.dtype) -> None:
    lengths = [*AWKWARD, (17, 90), (64, 128)]
    plan, mask = random_plan(lengths, num_slots=240, seed=6)
    call = random_call(plan, mask, dtype=dtype, seed=6)
    order = [5, 2, 7, 0, 4, 1, 6, 3]
    rows = list(torch.arange(plan.total_q).split(list(plan.seqlens_q)))
    slots = plan.kv_indices.split(list(plan.seqlens_k))
    permuted = dataclasses.replace(
        call,
        q=torch.cat([call.q[rows[i]] for i in order]),
        plan=plan_of_slots([lengths[i][0] for i in order], [slots[i] for i in order]),
    )
    out = run(call, impl)
    assert torch.equal(run(permuted, impl), torch.cat([out[rows[i]] for i in order]))


class LargestTensor(TorchDispatchMode):
    """Records the most elements that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def largest_tensor(impl: str, n: int, m: int) -> int:
    plan = plan_of_slots([n], [torch.randperm(m)])
    q, k, v = (torch.randn(length, 1, 16) for length in (n, m, m))
    with LargestTensor() as recorder:
        pevlm_prefill(q, k, v, plan, impl=impl)
    return recorder.elements


def test_sdpa_materialises_no_scores() -> None:
    """20k cached tokens and 2k queries: nothing larger than the gathered keys."""
    assert largest_tensor("sdpa", 2_000, 22_000) <= 22_000 * 16
    # The recorder can see what it looks for.
    assert largest_tensor("reference", 200, 2_200) >= 200 * 2_200


# --- Errors --------------------------------------------------------------------------------------


@pytest.fixture
def call() -> Call:
    plan, mask = random_plan([(3, 5)], num_slots=8)
    return random_call(plan, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"q": c.q[0]}, r"q: expected \[tokens, heads, head_dim\], got shape \(4, 64\)"),
        (lambda c: {"k_cache": c.k_cache[None]}, "k_cache: expected .* got shape"),
        (lambda c: {"v_cache": c.v_cache[0]}, "v_cache: expected .* got shape"),
        (lambda c: {"k_cache": c.k_cache.int()}, "k_cache: .* dtype on cpu.* got torch.int32"),
        (lambda c: {"v_cache": c.v_cache.to("meta")}, "v_cache: .* on cpu.* got .* meta"),
        (lambda c: {"q": c.q[:2]}, "q: expected 3 tokens, as the plan has, got 2"),
        (lambda c: {"v_cache": c.v_cache[:7]}, "the same slots and heads"),
        (lambda c: {"v_cache": c.v_cache[:, :1]}, "the same slots and heads"),
        (lambda c: {"k_cache": c.k_cache[..., :32]}, r"\[slots, kv_heads, 64\]"),
        (lambda c: {"q": c.q[:, :3]}, "expected a multiple of 2 key-value heads, got 3"),
    ],
)
@pytest.mark.parametrize("impl", HERE)
def test_interface_refuses(call: Call, impl: str, change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(call, **change(call)), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_cache_of_another_dtype_is_converted(call: Call, impl: str) -> None:
    """``--dtype float32 --kv-cache-dtype bf16``, as SGLang's torch_native serves it."""
    stored = {name: getattr(call, name).bfloat16() for name in ("k_cache", "v_cache")}
    widened = {name: tensor.to(call.q.dtype) for name, tensor in stored.items()}
    out = run(dataclasses.replace(call, **stored), impl)
    assert torch.equal(out, run(dataclasses.replace(call, **widened), impl))


def test_unknown_implementation_names_the_known(call: Call) -> None:
    with pytest.raises(ValueError, match=r"impl: expected one of .*sdpa.*, got 'sdpo'"):
        run(call, "sdpo")


def test_sdpa_refuses_other_devices_and_widths(call: Call) -> None:
    narrow = dataclasses.replace(call, v_cache=call.v_cache[..., :32])
    with pytest.raises(ValueError, match="expected values of width 64, as the keys, got 32"):
        run(narrow, "sdpa")
    tensors = {name: getattr(call, name).to("meta") for name in ("q", "k_cache", "v_cache")}
    with pytest.raises(ValueError, match="expected tensors on the CPU or a CUDA GPU, got meta"):
        run(dataclasses.replace(call, **tensors), "sdpa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlens_k": (5, 6, 7)}, r"seqlens_k: expected as many as seqlens_q \(2\), got 3"),
        ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, r"cu_seqlens_q: expected shape \(3,"),
        ({"cu_seqlens_k": torch.zeros(3)}, "cu_seqlens_k: .* torch.int32, got .* torch.float32"),
        ({"kv_indices": torch.zeros(11, dtype=torch.int32)}, "kv_indices: .* got .* torch.int32"),
        ({"kv_indices": torch.zeros(10, dtype=torch.int64)}, r"kv_indices: expected shape \(11,"),
        ({"full": (True,)}, r"full: expected as many as seqlens_q \(2\), got 1"),
        ({"seqlens_q": (3, 7)}, "expected 0 < seqlen_q <= seqlen_k, got 7 and 6"),
        ({"seqlens_q": (0, 2)}, "expected 0 < seqlen_q <= seqlen_k, got 0 and 5"),
    ],
)
def test_plan_refuses(change: dict, message: str) -> None:
    plan, _ = random_plan([(3, 5), (2, 6)], num_slots=8)
    assert isinstance(plan, PrefillPlan)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan, **change)


# --- The schedule of a kernel's programs ---------------------------------------------------------


@given(batches(), st.sampled_from([1, 4, 16]))
def test_tiles_cover_every_query_and_the_heavy_come_first(batch: Batch, block_m: int) -> None:
    plan = batch.plan
    tiles = plan.tiles(block_m)
    assert tiles.dtype == torch.int32
    covered, keys = [], []
    for seq, first in tiles.tolist():
        last = min(first + block_m, plan.seqlens_q[seq])
        covered += [(seq, query) for query in range(first, last)]
        keys.append(plan.seqlens_k[seq] - plan.seqlens_q[seq] + last)
    assert sorted(covered) == [(s, q) for s, n in enumerate(plan.seqlens_q) for q in range(n)]
    assert keys == sorted(keys, reverse=True)
    assert plan.tiles(block_m) is tiles, "built once a forward"


def test_tiles_of_sequences_that_are_no_multiple() -> None:
    """A last tile holds what is left, if it is one query."""
    plan, _ = random_plan([(5, 5), (4, 9), (1, 30), (9, 9)], num_slots=40)
    heavy_first = [[2, 0], [1, 0], [3, 8], [3, 4], [0, 4], [0, 0], [3, 0]]
    assert plan.tiles(4).tolist() == heavy_first
