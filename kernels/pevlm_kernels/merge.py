"""Attention over two disjoint sets of keys, from the attention over each."""

from __future__ import annotations

import torch

MERGED_BYTES = 128 * 2**20
"""Room for the wider products of :func:`merge_states`: so many rows are merged at a time."""


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
