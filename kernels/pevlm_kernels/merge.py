"""Attention over two disjoint sets of keys, from the attention over each."""

from __future__ import annotations

import torch

from pevlm_kernels.choice import is_installed


def merge_states(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh two outputs by the softmax denominators behind them.

    On a GPU with Triton in one pass and in place: operator by operator, this would read and write
    five times as much, a fifth of the time of the attention itself.

    Args:
        out, other: ``[n, num_q_heads, head_dim]``; ``out`` may be overwritten.
        lse, other_lse: ``[num_q_heads, n]``, natural log-sum-exp of the scaled scores; ``lse`` may
            be overwritten.

    Returns:
        The same two over all keys; the output in out's dtype.

    Source: the reduction of Flash-Decoding; FlashInfer calls it merging states.
    """
    if out.device.type == "cuda" and is_installed("triton"):
        from pevlm_kernels.triton_prefill import merge_in_place

        merge_in_place(out, lse, other, other_lse)
        return out, lse
    merged = torch.logaddexp(lse, other_lse)
    weight, other_weight = (
        (part - merged).exp().transpose(0, 1).unsqueeze(-1) for part in (lse, other_lse)
    )
    return (out * weight + other * other_weight).to(out.dtype), merged
