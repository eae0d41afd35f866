"""FlashInfer over virtual sequences: its paged prefill wrapper, planned with pages of one token.

The only importer of ``flashinfer``.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any

import torch

from pevlm_kernels.types import PrefillPlan, pinned

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 384 * 2**20  # FlashInfer asks for 128 MiB; long prompts on many SMs split further


def refusal(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why FlashInfer does not take these tensors; None if it does."""
    if q.device.type != "cuda":
        return f"expected tensors on a CUDA GPU, got {q.device}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "expected a GPU of sm_80 or newer"
    if q.dtype not in DTYPES:
        return f"expected q in float16 or bfloat16, got {q.dtype}"
    if q.shape[2] not in HEAD_DIMS or v_cache.shape[2] != q.shape[2]:
        return (
            f"expected heads of {HEAD_DIMS}, values as wide as keys, "
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
    """See :func:`pevlm_kernels.interface.pevlm_prefill`."""
    wrapper = _planned(q, k_cache, plan, softmax_scale)
    out, lse = wrapper.run(
        q,
        (k_cache.unsqueeze(1), v_cache.unsqueeze(1)),
        v_scale=None if v_scale == 1 else v_scale,
        return_lse=True,
    )
    # [total_q, num_q_heads], to the base 2.
    return out, lse.T * 0.6931471805599453


def _planned(
    q: torch.Tensor, k_cache: torch.Tensor, plan: PrefillPlan, softmax_scale: float
) -> Any:
    """The wrapper for layers of these heads and dtypes, planned for the first of them."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    heads = (q.shape[1], k_cache.shape[1], q.shape[2])
    key = ("flashinfer", heads, softmax_scale, q.dtype, k_cache.dtype)
    if key not in plan.memo:
        device = plan.kv_indices.device
        wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD")
        cu_seqlens_q, cu_seqlens_k, last_page_len = host_lists(plan)
        wrapper.plan(
            cu_seqlens_q,
            cu_seqlens_k,
            plan.kv_indices.to(torch.int32),
            last_page_len,
            *heads,
            1,
            causal=True,
            sm_scale=softmax_scale,
            q_data_type=q.dtype,
            kv_data_type=k_cache.dtype,
        )
        plan.memo[key] = wrapper
    return plan.memo[key]


def host_lists(plan: PrefillPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``cu_seqlens_q``, ``cu_seqlens_k`` and ``num_seqs`` page lengths of 1, int32 on the host.
    FlashInfer plans there: of tensors on the device it would make copies, and wait for them."""
    device = plan.kv_indices.device
    lists = [list(accumulate(lengths, initial=0)) for lengths in (plan.seqlens_q, plan.seqlens_k)]
    cu_seqlens_q, cu_seqlens_k, last_page_len = (
        pinned(torch.tensor(numbers, dtype=torch.int32), device)
        for numbers in (*lists, [1] * plan.num_seqs)
    )
    return cu_seqlens_q, cu_seqlens_k, last_page_len


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
