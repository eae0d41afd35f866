"""The definition of correct: softmax attention under a dense mask, in at least fp32."""

from __future__ import annotations

import torch

from pevlm_kernels.types import PrefillPlan


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    softmax_scale: float,
) -> torch.Tensor:
    """Softmax attention (paper equation (1)) under a mask, in fp64 for fp64 input, else in fp32.

    Args:
        q: ``[n, num_q_heads, head_dim]``
        k: ``[m, num_kv_heads, head_dim]``
        v: ``[m, num_kv_heads, head_dim_v]``
        mask: ``[n, m]`` bool, true where a query attends to a key; no row may be all false.

    Returns:
        ``[n, num_q_heads, head_dim_v]`` in q's dtype.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group, dim=1)
    values = v.to(dtype).repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q.to(dtype), keys) * softmax_scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float,
) -> torch.Tensor:
    """See :func:`pevlm_kernels.interface.pevlm_prefill`. One dense mask a virtual sequence."""
    parts = []
    q_start = k_start = 0
    for n, m in zip(plan.seqlens_q, plan.seqlens_k, strict=True):
        slots = plan.kv_indices[k_start : k_start + m]
        rows = torch.arange(m - n, m, device=q.device)
        mask = torch.arange(m, device=q.device) <= rows[:, None]
        parts.append(
            masked_attention(
                q[q_start : q_start + n],
                k_cache[slots],
                v_cache[slots],
                mask,
                softmax_scale=softmax_scale,
            )
        )
        q_start, k_start = q_start + n, k_start + m
    return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], v_cache.shape[2])
