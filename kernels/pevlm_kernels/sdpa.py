"""The CPU path: PyTorch's fused attention over virtual sequences.

PyTorch's causal flag is aligned to the top left, and a mask aligned to the bottom right would be a
materialised ``[n, m]`` tensor. So a virtual sequence of n queries and m keys runs in two calls that
need no mask, merged by their log-sum-exp: all queries against the m - n keys before them, and the
queries against themselves, causal and square. No score is computed in vain.
"""

from __future__ import annotations

import torch

from pevlm_kernels.types import PrefillPlan


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float,
) -> torch.Tensor:
    """See :func:`pevlm_kernels.interface.pevlm_prefill`.

    Raises:
        ValueError: tensors that are not on the CPU, or values of another width than the keys.
    """
    if q.device.type != "cpu":
        raise ValueError(f"impl 'sdpa': expected tensors on the CPU, got {q.device}")
    if v_cache.shape[2] != q.shape[2]:
        raise ValueError(
            f"impl 'sdpa': expected values of width {q.shape[2]}, as the keys, "
            f"got {v_cache.shape[2]}"
        )
    out = torch.empty_like(q)
    q_start = k_start = 0
    for n, m in zip(plan.seqlens_q, plan.seqlens_k, strict=True):
        slots = plan.kv_indices[k_start : k_start + m]
        out[q_start : q_start + n] = _virtual_sequence(
            q[q_start : q_start + n],
            k_cache[slots].to(q.dtype),
            v_cache[slots].to(q.dtype),
            softmax_scale,
        )
        q_start, k_start = q_start + n, k_start + m
    return out


def _virtual_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """``[n, num_q_heads, head_dim]`` queries against ``[m, num_kv_heads, head_dim]`` keys."""
    prefix = k.shape[0] - q.shape[0]
    own, own_lse = _fused(q, k[prefix:], v[prefix:], causal=True, softmax_scale=softmax_scale)
    if prefix:
        cached = k[:prefix], v[:prefix]
        past, past_lse = _fused(q, *cached, causal=False, softmax_scale=softmax_scale)
        lse = torch.logaddexp(own_lse, past_lse)
        own = own * (own_lse - lse).exp().unsqueeze(-1)
        own = own + past * (past_lse - lse).exp().unsqueeze(-1)
    return own.transpose(0, 1).to(q.dtype)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[num_q_heads, n, head_dim]`` output and ``[num_q_heads, n]`` fp32 log-sum-exp.

    The operator behind ``torch.nn.functional.scaled_dot_product_attention`` on the CPU; the public
    function does not return the log-sum-exp.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        0.0,
        causal,
        scale=softmax_scale,
    )
    return out.squeeze(0), lse.squeeze(0)
