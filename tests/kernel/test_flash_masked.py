"""FlashAttention-4's block-sparse path: its lists and its mask against the specification's, its
adapter on an emulation, and, with the real library, the mask evaluated on the CPU and the kernel
compiled for Hopper and Blackwell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernel.test_libraries import OnGpu, batch_calls, check, parameters_in_file
from kernel.test_packed import LAYOUTS, packed_call, spec
from pevlm_kernels import choice, flash_masked, packed_plan
from pevlm_kernels.flash_masked import BLOCK_K, Blocks, blocks_of, keys_of_rows, visible
from pevlm_kernels.reference import masked_attention_lse
from support.isolated import run_module

LONG = (1500, 300, ((300, 700), (700, 1100), (1100, 1400)))
ALL = {**LAYOUTS, "several blocks of scores": LONG}


def columns(count: torch.Tensor, index: torch.Tensor, row: int) -> list[int]:
    """The listed columns of a row of blocks; the library reads them from the last to the first, and
    masks what lies beyond the keys in the one that it reads first."""
    found: list[int] = index[0, 0, row, : count[0, 0, row]].tolist()
    assert found == sorted(set(found))
    return found


def emulated_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    mask_mod: Callable[..., torch.Tensor],
    aux_tensors: list[torch.Tensor],
    block_sparse_tensors: tuple[Blocks, tuple[int, int]],
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-4's ``flash_attn_func``, as far as the adapter uses it: full blocks are
    computed whole, masked ones ask ``mask_mod``, others are skipped."""
    blocks, (block_q, block_k) = block_sparse_tensors
    length = q.shape[1]
    rows = -(-length // block_q)
    assert return_lse
    assert all(len(rows_of) == rows * block_q for rows_of in aux_tensors), "read to the end"
    for count, index in ((blocks[0], blocks[1]), (blocks[2], blocks[3])):
        assert count.dtype == index.dtype == torch.int32
        assert count.shape == (1, 1, rows)
        assert index.shape[:3] == (1, 1, rows)
    mask = torch.zeros(rows * block_q, -(-length // block_k) * block_k, dtype=torch.bool)
    for row in range(rows):
        at = slice(row * block_q, (row + 1) * block_q)
        numbers = torch.arange(at.start, at.stop)[:, None]
        for column in columns(blocks.mask_count, blocks.mask_index, row):
            keys = torch.arange(column * block_k, (column + 1) * block_k)
            mask[at, keys] = mask_mod(0, 0, numbers, keys, None, aux_tensors)
        for column in columns(blocks.full_count, blocks.full_index, row):
            assert not mask[at, column * block_k].any(), "listed twice"
            mask[at, column * block_k : (column + 1) * block_k] = True
    out, lse = masked_attention_lse(
        q[0], k[0], v[0], mask[:length, :length], softmax_scale=softmax_scale
    )
    return out[None], lse[None]


@pytest.fixture(params=[(9, 0), (10, 0)], ids=["Hopper", "Blackwell"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: request.param)

    def mask_mod(
        batch: int, head: int, q: torch.Tensor, k: torch.Tensor, lengths: None, rows: list
    ):
        return visible(q, k, rows[0][q], rows[1][q])

    def tensors(*blocks: torch.Tensor, block_size: tuple[int, int]) -> tuple:
        return Blocks(*blocks), block_size

    library = flash_masked.Library(emulated_flash_attn_func, mask_mod, tensors)
    monkeypatch.setattr(flash_masked, "load", lambda: library)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("layout", ALL.values(), ids=ALL.keys())
def test_within_budget(layout: tuple) -> None:
    check(flash_masked, packed_call(*layout), v_scale=0.5 if layout[1] % 2 else 1.0)


@pytest.mark.usefixtures("emulated")
def test_needs_a_packed_plan() -> None:
    (call, _) = batch_calls()
    with pytest.raises(ValueError, match="'flash_masked': expected the plan of one packed"):
        check(flash_masked, call)


@pytest.mark.parametrize("block_q", [128, 256])
@pytest.mark.parametrize("layout", ALL.values(), ids=ALL.keys())
def test_lists_are_exact_where_it_pays(layout: tuple, block_q: int) -> None:
    """Every block with a visible score is listed and no other; full ones are full. Past the blocks
    that two virtual sequences share, full ones are never asked about."""
    length = layout[0]
    plan = packed_plan(*layout, torch.device("cpu"))
    past, own = keys_of_rows(plan, block_q)
    blocks = blocks_of(past, own, length, block_q)
    mask = spec(*layout)
    q, k = torch.arange(length)[:, None], torch.arange(length)
    assert torch.equal(visible(q, k, past[:length, None], own[:length, None]), mask)
    for row in range(-(-length // block_q)):
        part = mask[row * block_q : (row + 1) * block_q].split(BLOCK_K, dim=1)
        masked = columns(blocks.mask_count, blocks.mask_index, row)
        full = columns(blocks.full_count, blocks.full_index, row)
        assert sorted(masked + full) == [i for i, scores in enumerate(part) if scores.any()]
        assert all(part[i].all() and part[i].shape[1] == BLOCK_K for i in full)
        of_one = len(own[row * block_q : min((row + 1) * block_q, length)].unique()) == 1
        if of_one:
            assert not any(part[i].all() and part[i].shape[1] == BLOCK_K for i in masked)


def test_work_is_the_layouts() -> None:
    """At the paper's example: how many scores are computed, listed blocks whole, over those that
    are visible."""
    blocks = tuple((start, min(start + 4096, 99_936)) for start in range(4160, 99_936, 4096))
    plan = packed_plan(100_000, 4160, blocks, torch.device("cpu"))
    past, own = keys_of_rows(plan, 128)
    found = blocks_of(past, own, plan.total_q, 128)
    computed = int((found.mask_count + found.full_count).sum()) * 128 * 128
    seen = sum(
        n * (m - n) + n * (n + 1) // 2 for n, m in zip(plan.seqlens_q, plan.seqlens_k, strict=True)
    )
    assert 1 < computed / seen < 1.08
    assert int(found.mask_count.sum()) < 0.15 * int(found.full_count.sum())


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "message"),
    [
        ((8, 0), True, torch.bfloat16, 128, r"Hopper or Blackwell .* got \(8, 0\)"),
        ((12, 0), True, torch.bfloat16, 128, r"got \(12, 0\)"),
        ((9, 0), False, torch.bfloat16, 128, "pip install flash-attn-4"),
        ((9, 0), True, torch.float32, 128, "expected q in float16 or bfloat16, got torch.float32"),
        ((9, 0), True, torch.bfloat16, 256, "up to 128, values as wide as keys, got 256 and 256"),
        ((9, 0), True, torch.bfloat16, 100, "a multiple of 8 .* got 100 and 100"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: bool,
    dtype: torch.dtype,
    head_dim: int,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    monkeypatch.setattr(flash_masked, "is_installed", lambda name: installed)
    tensor = OnGpu(head_dim, dtype)
    with pytest.raises(ValueError, match=message):
        choice.require("flash_masked", tensor, tensor, tensor)


# --- The real library ----------------------------------------------------------------------------

INTERFACE = ("flash-attn-4", "flash_attn/cute/interface.py", "flash_attn_func")


def test_arguments_exist() -> None:
    own = set(emulated_flash_attn_func.__annotations__) - {"return"}
    assert own <= parameters_in_file(*INTERFACE)


@pytest.mark.parametrize("major", [9, 10])
def test_real_mask_and_kernel(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, with the variables that the library reads when it is imported."""
    for name, value in (
        ("FLASH_ATTENTION_ARCH", f"sm_{major}0"),
        ("CUTE_DSL_ARCH", f"sm_{major}0a"),
        ("FLASH_ATTENTION_NUM_SMS", "132"),
    ):
        monkeypatch.setenv(name, value)
    run_module("support.flash_masked_checks", str(major))
