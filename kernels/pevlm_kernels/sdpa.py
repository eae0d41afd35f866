"""PyTorch's fused attention over virtual sequences: the CPU's path, and any GPU's without Triton.

PyTorch's causal flag is aligned to the top left, and a mask aligned to the bottom right would be a
materialised ``[n, m]`` tensor. So a virtual sequence of n queries and m keys runs in two calls that
need no mask, merged by their log-sum-exp: all queries against the m - n keys before them, and the
queries against themselves, causal and square. No score is computed in vain.
"""

from __future__ import annotations

import torch

from pevlm_kernels.merge import merge_states
from pevlm_kernels.types import PrefillPlan


def refusal(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why PyTorch's operators do not take these tensors; None if they do."""
    if q.device.type not in ("cpu", "cuda"):
        return f"expected tensors on the CPU or a CUDA GPU, got {q.device}"
    if q.device.type == "cuda" and q.dtype == torch.float64:
        return "expected float16, bfloat16 or float32 on a GPU, got torch.float64"
    if v_cache.shape[2] != q.shape[2]:
        return f"expected values of width {q.shape[2]}, as the keys, got {v_cache.shape[2]}"
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
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    q_start = k_start = 0
    for n, m in zip(plan.seqlens_q, plan.seqlens_k, strict=True):
        rows = slice(q_start, q_start + n)
        slots = plan.kv_indices[k_start : k_start + m]
        values, lse[:, rows] = _virtual_sequence(
            q[rows], k_cache[slots].to(q.dtype), v_cache[slots].to(q.dtype), softmax_scale
        )
        out[rows] = values if v_scale == 1 else values * v_scale
        q_start, k_start = q_start + n, k_start + m
    return out, lse


def _virtual_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, num_q_heads, head_dim]`` queries against ``[m, num_kv_heads, head_dim]`` keys."""
    prefix = k.shape[0] - q.shape[0]
    own = fused_attention(q, k[prefix:], v[prefix:], causal=True, softmax_scale=softmax_scale)
    if not prefix:
        return own
    past = fused_attention(q, k[:prefix], v[:prefix], causal=False, softmax_scale=softmax_scale)
    merge_states(*own, *past)
    return own


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operators behind ``torch.nn.functional.scaled_dot_product_attention``; the public
    function does not return the log-sum-exp.

    Args:
        q: ``[n, num_q_heads, head_dim]``
        k, v: ``[m, num_kv_heads, head_dim]``
        causal: aligned to the top left, so for n == m only.

    Returns:
        ``[n, num_q_heads, head_dim]`` and ``[num_q_heads, n]``, the log-sum-exp.
    """
    heads = [part.transpose(0, 1).unsqueeze(0) for part in (q, k, v)]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads, 0.0, causal, scale=softmax_scale
        )
    elif q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] <= 256:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *heads, 0.0, causal, scale=softmax_scale
        )
    else:
        # No grouped queries, and a log-sum-exp that is padded to whole tiles.
        group = q.shape[1] // k.shape[1]
        heads[1:] = [part.repeat_interleave(group, dim=1) for part in heads[1:]]
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            *heads, None, True, 0.0, causal, scale=softmax_scale
        )
        lse = lse[..., : q.shape[0]]
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)
