"""Attention over two disjoint sets of keys, from the attention over each."""

from __future__ import annotations

import torch


def merge_states(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh two outputs by the softmax denominators behind them.

    Args:
        out, other: ``[n, num_q_heads, head_dim]``
        lse, other_lse: ``[num_q_heads, n]``, natural log-sum-exp of the scaled scores.

    Returns:
        The same two over all keys; the output in out's dtype.

    Source: the reduction of Flash-Decoding; FlashInfer calls it merging states.
    """
    merged = torch.logaddexp(lse, other_lse)
    weight, other_weight = (
        (part - merged).exp().transpose(0, 1).unsqueeze(-1) for part in (lse, other_lse)
    )
    return (out * weight + other * other_weight).to(out.dtype), merged
