"""FlashAttention-3 over virtual sequences, through a table of pages of one token.

Nothing is gathered, but the kernel loads keys row by row (cp.async) instead of tile by tile (TMA),
and the table is a rectangle: 1 GB at a million tokens in blocks of 4k.
"""

from __future__ import annotations

import torch

from pevlm_kernels import flash
from pevlm_kernels.types import PrefillPlan


def refusal(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why FlashAttention-3 does not take these tensors; None if it does."""
    if reason := flash.refusal(q, k_cache, v_cache):
        return reason
    library = flash.library_for(torch.cuda.get_device_capability(q.device))
    if library is None or library.version != 3:
        return "expected FlashAttention-3, the only one with pages of one token: Hopper's"
    if k_cache.dtype != q.dtype:
        return f"expected a cache in {q.dtype}, as q, got {k_cache.dtype}"
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
    out, lse = flash.varlen(q.device)(
        q,
        k_cache.unsqueeze(1),
        v_cache.unsqueeze(1),
        cu_seqlens_q=plan.cu_seqlens_q,
        cu_seqlens_k=None,
        seqused_k=plan.cu_seqlens_k.diff(),
        page_table=token_table(plan),
        max_seqlen_q=plan.max_seqlen_q,
        max_seqlen_k=plan.max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=True,
    )
    return (out if v_scale == 1 else out * v_scale), lse


def token_table(plan: PrefillPlan) -> torch.Tensor:
    """``[num_seqs, max_seqlen_k]`` int32 cache slots, a row a virtual sequence, padded with 0."""
    if "token_table" not in plan.memo:
        device = plan.kv_indices.device
        lengths = plan.cu_seqlens_k.diff()
        # Row i of the table starts at i * width, its keys in the list at cu_seqlens_k[i]. Written
        # by place and not by a mask, whose number of places the host would have to wait for.
        width, total = plan.max_seqlen_k, len(plan.kv_indices)
        starts = torch.arange(plan.num_seqs, device=device) * width - plan.cu_seqlens_k[:-1]
        of_seq = torch.repeat_interleave(lengths, output_size=total)
        places = torch.arange(total, device=device) + starts[of_seq]
        table = torch.zeros(plan.num_seqs * width, dtype=torch.int32, device=device)
        table[places] = plan.kv_indices.to(torch.int32)
        plan.memo["token_table"] = table.view(plan.num_seqs, width)
    found: torch.Tensor = plan.memo["token_table"]
    return found
