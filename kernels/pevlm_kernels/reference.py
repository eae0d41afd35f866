"""The definition of correct: softmax attention under a dense mask, in at least fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pevlm_kernels.types import PrefillPlan


def masked_attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    softmax_scale: float,
    v_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention (paper equation (1)) under a mask, in fp64 for fp64 input, else in fp32.

    Args:
        q: ``[n, num_q_heads, head_dim]``
        k: ``[m, num_kv_heads, head_dim]``
        v: ``[m, num_kv_heads, head_dim_v]``
        mask: ``[n, m]`` bool, true where a query attends to a key; no row may be all false.
        softmax_scale: factor on the scores.
        v_scale: factor on the values.

    Returns:
        ``[n, num_q_heads, head_dim_v]`` in q's dtype, and the log-sum-exp of the scores,
        ``[num_q_heads, n]`` in the dtype of the computation.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group, dim=1)
    values = (v.to(dtype) * v_scale).repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q.to(dtype), keys) * softmax_scale
    scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.einsum("hnm,mhd->nhd", scores.softmax(dim=-1), values)
    return out.to(q.dtype), scores.logsumexp(dim=-1)


def refusal(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """None: the definition takes everything."""
    return None


def sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, v_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One dense mask a virtual sequence."""
    n, m = len(q), len(k)
    mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return masked_attention_lse(q, k, v, mask, softmax_scale=softmax_scale, v_scale=v_scale)


def each_sequence(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    **scales: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``attend(q, k, v, **scales)`` on one virtual sequence after the other: its queries, and
    its keys and values gathered. See :func:`pevlm_kernels.interface.pevlm_prefill`."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(*q.shape[:2], v_cache.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    row = 0
    for n, slots in zip(plan.seqlens_q, plan.kv_indices.split(list(plan.seqlens_k)), strict=True):
        rows = slice(row, row + n)
        out[rows], lse[:, rows] = attend(q[rows], k_cache[slots], v_cache[slots], **scales)
        row += n
    return out, lse


prefill = partial(each_sequence, sequence)
