"""Layouts and lengths of a batch → the virtual sequences that a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from pevlm_kernels.types import PrefillPlan, upload_lists
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
    keys = [(sequence.row, sequence.piece.keys) for sequence in sequences]
    seqlens_q = tuple(sequence.piece.num_queries for sequence in sequences)
    return PrefillPlan(
        *slot_lists(seqlens_q, keys, req_to_token, req_pool_indices),
        seqlens_q=seqlens_q,
        seqlens_k=tuple(sequence.piece.num_keys for sequence in sequences),
        full=tuple(sequence.piece.is_full for sequence in sequences),
    )


def slot_lists(
    seqlens_q: Sequence[int],
    keys: Sequence[tuple[int, Sequence[Range]]],
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cache slots of each sequence's token ranges, one list after the other.

    Only lengths and ranges travel to the device, in one copy that the host does not wait for; the
    slots are gathered there.

    Args:
        seqlens_q: query counts.
        keys: of each sequence, the row of the batch and ranges of positions.
        req_to_token, req_pool_indices: see :func:`build_plan`.

    Returns:
        ``cu_seqlens_q``, ``cu_seqlens_k`` and ``kv_indices`` as in :class:`PrefillPlan`.
    """
    seqlens_k = [sum(end - start for start, end in ranges) for _, ranges in keys]
    rows = [row for row, ranges in keys for _ in ranges]
    bounds = [bound for _, ranges in keys for bound in ranges]
    ends = list(accumulate(end - start for start, end in bounds))
    total = ends[-1] if ends else 0
    # Position of output j = start of its range + (j - outputs before the range) = j + shift.
    shifts = [end_of_range - end for (_, end_of_range), end in zip(bounds, ends, strict=True)]
    device = req_to_token.device
    cu_seqlens_q, cu_seqlens_k, places, row_of_range, shift_of_range = upload_lists(
        [
            list(accumulate(seqlens_q, initial=0)),
            list(accumulate(seqlens_k, initial=0)),
            [0, *ends],
            rows,
            shifts,
        ],
        device,
    )
    of_range = torch.repeat_interleave(places.diff(), output_size=total)
    positions = torch.arange(total, device=device) + shift_of_range[of_range]
    pool_row = req_pool_indices[row_of_range][of_range]
    return cu_seqlens_q, cu_seqlens_k, req_to_token[pool_row, positions].to(torch.int64)
