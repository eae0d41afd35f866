"""PyTorch's fused attention over virtual sequences: the CPU's path, and any GPU's without Triton.

PyTorch's causal flag is aligned to the top left, and a mask aligned to the bottom right would be a
materialised ``[n, m]`` tensor. So a virtual sequence of n queries and m keys runs in two calls that
need no mask, merged by their log-sum-exp: all queries against the m - n keys before them, and the
queries against themselves, causal and square. No score is computed in vain.
"""

from __future__ import annotations

from functools import partial

import torch

from pevlm_kernels.reference import each_sequence

MERGED_BYTES = 128 * 2**20
"""Room for the wider products of :func:`merge_states`: so many rows are merged at a time."""


def refusal(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why PyTorch's operators do not take these tensors; None if they do."""
    if q.device.type not in ("cpu", "cuda"):
        return f"expected tensors on the CPU or a CUDA GPU, got {q.device}"
    if q.device.type == "cuda" and q.dtype == torch.float64:
        return "expected float16, bfloat16 or float32 on a GPU, got torch.float64"
    if v_cache.shape[2] != q.shape[2]:
        return f"expected values of width {q.shape[2]}, as the keys, got {v_cache.shape[2]}"
    return None


def sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, v_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One virtual sequence in two calls."""
    k, v, before = k.to(q.dtype), v.to(q.dtype), len(k) - len(q)
    own = fused_attention(q, k[before:], v[before:], causal=True, softmax_scale=softmax_scale)
    if before:
        k, v = k[:before], v[:before]
        merge_states(*own, *fused_attention(q, k, v, causal=False, softmax_scale=softmax_scale))
    return own if v_scale == 1 else (own[0] * v_scale, own[1])


prefill = partial(each_sequence, sequence)


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


def merge_states(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Weigh two outputs by the softmax denominators behind them, into the first.

    Args:
        out, other: ``[n, num_q_heads, head_dim]``; ``out`` becomes the output over all keys.
        lse, other_lse: ``[num_q_heads, n]``, natural log-sum-exp of the scaled scores; ``lse``
            becomes that over all keys.

    Source: the reduction of Flash-Decoding; FlashInfer calls it merging states.
    """
    merged = torch.logaddexp(lse, other_lse)
    at_once = max(1, MERGED_BYTES // max(1, 2 * lse.element_size() * out[:1].numel()))
    for start in range(0, len(out), at_once):
        rows = slice(start, start + at_once)
        weight, other_weight = (
            (part[:, rows] - merged[:, rows]).exp().T.unsqueeze(-1) for part in (lse, other_lse)
        )
        total = out[rows] * weight
        total += other[rows] * other_weight
        out[rows] = total
    lse.copy_(merged)
