"""FlashAttention-4 over one packed sequence, as one call: its block-sparse path with a mask.

FlashAttention-4 skips blocks of scores that a list leaves out, computes listed ones whole, and asks
a function about each score of the rest. Nothing is gathered, split or merged. What it costs
instead: lists as wide as the question's row (one int32 a block of scores: 128 MB to 256 MB at a
million tokens), and a function call a score on the blocks' edges.

Of Hopper and Blackwell (compute capabilities 9, 10 and 11) alone: elsewhere the library has no
block-sparse kernel.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from pevlm_kernels import flash
from pevlm_kernels.choice import is_installed
from pevlm_kernels.types import PrefillPlan

MODULE = "flash_attn.cute"
# What the kernels' tiles of 128 x 128 divide; Blackwell's take two of them at once.
BLOCK_Q, BLOCK_K = {9: 128, 10: 256, 11: 256}, 128
LARGEST_HEAD = 128  # wider ones have tiles that do not divide these


class Blocks(NamedTuple):
    """Which blocks of scores to compute, in the library's layout: for each row of
    blocks, numbers of columns in ascending order, as many as the count says.

    Attributes:
        mask_count, mask_index: ``[1, 1, rows]`` and ``[1, 1, rows, most]`` int32, the blocks in
            which some scores are visible.
        full_count, full_index: likewise, the blocks in which all are.
    """

    mask_count: torch.Tensor
    mask_index: torch.Tensor
    full_count: torch.Tensor
    full_index: torch.Tensor


def refusal(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why FlashAttention-4 does not take these tensors; None if it does."""
    if q.device.type != "cuda":
        return f"expected tensors on a CUDA GPU, got {q.device}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability[0] not in BLOCK_Q:
        return f"expected a GPU of Hopper or Blackwell (sm_90 to sm_11x), got {capability}"
    if not is_installed(MODULE):
        return "FlashAttention-4 is not installed: pip install flash-attn-4"
    if q.dtype not in flash.DTYPES:
        return f"expected q in float16 or bfloat16, got {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > LARGEST_HEAD or v_cache.shape[2] != q.shape[2]:
        return (
            f"expected heads of a multiple of 8 up to {LARGEST_HEAD}, values as wide as keys, "
            f"got {q.shape[2]} and {v_cache.shape[2]}"
        )
    return None


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float,
    v_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`pevlm_kernels.interface.pevlm_prefill`.

    Raises:
        ValueError: a plan of anything but one packed sequence.
    """
    if plan.seams is None:
        raise ValueError(
            "impl 'flash_masked': expected the plan of one packed sequence (packed_plan), whose "
            "keys are two runs of rows; got a list of cache slots"
        )
    library = load()
    block_q = BLOCK_Q[torch.cuda.get_device_capability(q.device)[0]]
    if "flash_masked" not in plan.memo:
        past, own = keys_of_rows(plan, block_q)
        plan.memo["flash_masked"] = past, own, blocks_of(past, own, plan.total_q, block_q)
    past, own, blocks = plan.memo["flash_masked"]
    out, lse = library.attention(
        q[None],
        k_cache[None].to(q.dtype),
        v_cache[None].to(q.dtype),
        softmax_scale=softmax_scale,
        mask_mod=library.mask_mod,
        aux_tensors=[past, own],
        block_sparse_tensors=library.tensors(*blocks, block_size=(block_q, BLOCK_K)),
        return_lse=True,
    )
    return (out[0] if v_scale == 1 else out[0] * v_scale), lse[0]


def visible(q: Any, k: Any, past: Any, own: Any) -> Any:
    """Whether row q sees key k, elementwise, on PyTorch's tensors as on the kernel's values.

    Args:
        q, k: rows of the packed sequence.
        past: how many of the first rows q sees.
        own: the first row of q's own virtual sequence.
    """
    return (k <= q) & ((k < past) | (k >= own))


def keys_of_rows(plan: PrefillPlan, block_q: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``past`` and ``own`` of :func:`visible`, int32 on the plan's device: one number a row, and on
    to the end of the last block, since the kernel asks about its rows too (and keeps no answer)."""
    n = torch.tensor(plan.seqlens_q)
    pasts = torch.tensor(plan.seqlens_k) - n
    starts = torch.tensor(list(accumulate(plan.seqlens_q[:-1], initial=0)))
    beyond = -plan.total_q % block_q
    past, own = (
        torch.nn.functional.pad(part.repeat_interleave(n), (0, beyond))
        .to(torch.int32)
        .to(plan.cu_seqlens_q.device)
        for part in (pasts, starts)
    )
    return past, own


def blocks_of(past: torch.Tensor, own: torch.Tensor, length: int, block_q: int) -> Blocks:
    """The lists of a mask.

    Args:
        past, own: see :func:`keys_of_rows`.
        length: rows of the sequence.
        block_q: rows of a block; a block has BLOCK_K keys.

    A block is called full only when that shows from its rows' extremes; one that is full all the
    same is asked about score by score, and comes out right.
    """
    rows, columns = len(past) // block_q, -(-length // BLOCK_K)
    first_row = torch.arange(rows, device=past.device)[:, None] * block_q
    beyond_row = (first_row + block_q).clamp(max=length)
    first_key = torch.arange(columns, device=past.device) * BLOCK_K
    beyond_key = first_key + BLOCK_K
    inside = torch.arange(len(past), device=past.device) < length
    least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max

    def extremes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[rows, 1]`` smallest and largest value of each row of blocks."""
        low = values.masked_fill(~inside, most).view(rows, block_q).amin(1, keepdim=True)
        high = values.masked_fill(~inside, least).view(rows, block_q).amax(1, keepdim=True)
        return low, high

    low_past, high_past = extremes(past)
    low_own, high_own = extremes(own)
    low_gap, _ = extremes(past - own)  # 0 where a row sees everything before it
    # The virtual sequences tile the rows: their own keys leave no gap between low_own and the row.
    some = (first_key < high_past) | ((beyond_key > low_own) & (first_key < beyond_row))
    own_or_all = (first_key >= high_own) | (low_gap >= 0)
    full = (beyond_key <= low_past) | (own_or_all & (beyond_key <= first_row + 1))
    return Blocks(*_listed(some & ~full), *_listed(full))


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, columns]`` bool → counts and column numbers, as in :class:`Blocks`."""
    count = chosen.sum(1)
    row, column = chosen.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    most = max(int(count.max()), 1)
    index = torch.zeros(len(chosen), most, dtype=torch.int32, device=row.device)
    index[row, place] = column.to(torch.int32)
    return count.to(torch.int32)[None, None], index[None, None]


class Library(NamedTuple):
    """FlashAttention-4's ``flash_attn_func``, :func:`visible` in its language, and its class for
    :class:`Blocks`."""

    attention: Any
    mask_mod: Any
    tensors: Any


@cache
def load() -> Library:
    """Import the library; the mask is compiled at the first call, with the kernel."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    @cute.jit
    def mask_mod(batch, head, q, k, lengths, rows):  # type: ignore[no-untyped-def]
        past = utils.scalar_to_ssa(rows[0][q[0]], cutlass.Int32)
        own = utils.scalar_to_ssa(rows[1][q[0]], cutlass.Int32)
        return visible(q, k, past, own)

    return Library(flash_attn_func, mask_mod, BlockSparseTensorsTorch)
