"""Layouts and lengths of a batch → the virtual sequences that a kernel runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from pevlm_kernels.types import PrefillPlan
from pevlm_sglang.layout import Layout, Piece, Range


@dataclass(frozen=True)
class VirtualSequence:
    """A piece of one request of the batch.

    Attributes:
        row: index of the request in the batch.
        piece: its queries and key ranges, as positions in the request.
    """

    row: int
    piece: Piece


def virtual_sequences(
    layouts: Sequence[Layout], prefix_lens: Sequence[int], extend_lens: Sequence[int]
) -> list[VirtualSequence]:
    """Cut a prefill batch into virtual sequences, in the order of its tokens.

    Args:
        layouts: one a request; ``Layout()`` for text and for decode rows of a mixed batch.
        prefix_lens: tokens that are cached already, a request.
        extend_lens: tokens that this forward computes, a request.

    Raises:
        ValueError: the three differ in length.
    """
    return [
        VirtualSequence(row, piece)
        for row, (layout, prefix, extend) in enumerate(
            zip(layouts, prefix_lens, extend_lens, strict=True)
        )
        for piece in layout.pieces(prefix, prefix + extend)
    ]


def build_plan(
    sequences: Sequence[VirtualSequence],
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
) -> PrefillPlan:
    """The plan of one forward.

    Args:
        sequences: see :func:`virtual_sequences`.
        req_to_token: ``[max_requests, max_context_len]`` integer, the cache slot of each token.
        req_pool_indices: ``[batch_size]`` integer, the request's row in ``req_to_token``.

    Returns:
        The plan, on the device of ``req_to_token``.
    """
    seqlens_q = tuple(s.piece.num_queries for s in sequences)
    seqlens_k = tuple(s.piece.num_keys for s in sequences)
    return PrefillPlan(
        cu_seqlens_q=cumulative(seqlens_q, req_to_token.device),
        cu_seqlens_k=cumulative(seqlens_k, req_to_token.device),
        kv_indices=gather_slots(
            ((s.row, key_range) for s in sequences for key_range in s.piece.keys),
            req_to_token,
            req_pool_indices,
        ),
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
    )


def cumulative(lengths: Iterable[int], device: torch.device) -> torch.Tensor:
    """``[n + 1]`` int32 running sums of n lengths, from 0."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def gather_slots(
    ranges: Iterable[tuple[int, Range]],
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
) -> torch.Tensor:
    """The cache slots of token ranges, one after the other.

    Only the table of ranges travels to the device; the slots are gathered there.

    Args:
        ranges: (row of the batch, range of positions).
        req_to_token, req_pool_indices: see :func:`build_plan`.

    Returns:
        ``[total]`` int64
    """
    table = [(row, start, end - start) for row, (start, end) in ranges]
    device = req_to_token.device
    total = sum(length for _, _, length in table)
    if not total:
        return torch.empty(0, dtype=torch.int64, device=device)
    rows, starts, lengths = torch.tensor(table, dtype=torch.int64).T.contiguous().to(device)
    # Position of output j = start of its range + (j - outputs before the range).
    offsets = starts - (lengths.cumsum(0) - lengths)
    of_range = torch.repeat_interleave(lengths, output_size=total)
    positions = torch.arange(total, device=device) + offsets[of_range]
    return req_to_token[req_pool_indices[rows[of_range]], positions].to(torch.int64)
