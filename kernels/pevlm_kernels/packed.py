"""One packed sequence, as most offline code has it: sink, context blocks, question."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from pevlm_kernels.interface import pevlm_prefill
from pevlm_kernels.types import PrefillPlan, upload, upload_lists

Block = tuple[int, int]


def pevlm_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_end: int,
    blocks: Sequence[Block],
    softmax_scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Any:
    """PEVLM's attention of one layer over one sequence.

    The sink ``[0, sink_end)`` is causal. A block sees the sink and its own past. What follows the
    blocks, the question, sees everything before it.

    Args:
        q: ``[length, num_q_heads, head_dim]``, floating point.
        k: ``[length, num_kv_heads, head_dim]``
        v: ``[length, num_kv_heads, head_dim_v]``
        sink_end: tokens of the sink; may be 0.
        blocks: half-open token ranges that tile ``[sink_end, blocks_end)``; may be none.
        softmax_scale, impl, return_lse: see :func:`pevlm_kernels.pevlm_prefill`.

    Returns:
        As :func:`pevlm_kernels.pevlm_prefill`.

    Raises:
        ValueError: blocks that do not tile, or tensors that do not fit; see there too.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3 or tensor.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name}: expected [length, heads, head_dim] of one length, got "
                f"{tuple(tensor.shape)} beside q {tuple(q.shape)}"
            )
    if wrong := [block for block in blocks if len(block) != 2]:
        raise ValueError(f"blocks: expected (start, end), got {wrong[0]!r}")
    pairs = tuple((int(start), int(end)) for start, end in blocks)
    plan = packed_plan(q.shape[0], sink_end, pairs, q.device)
    return pevlm_prefill(
        q, k, v, plan, softmax_scale=softmax_scale, impl=impl, return_lse=return_lse
    )


@lru_cache(maxsize=8)
def packed_plan(
    length: int, sink_end: int, blocks: tuple[Block, ...], device: torch.device
) -> PrefillPlan:
    """The plan behind :func:`pevlm_attention`; kept, since every layer asks for it.

    Row i of q, k and v is token i. What sees everything before it is one virtual sequence with its
    neighbour: the sink with the first block; the question with them, where there is no other block.

    Raises:
        ValueError: blocks that do not tile ``[sink_end, blocks_end)``, or reach beyond the length.
    """
    pieces = _pieces(length, sink_end, blocks)
    seqlens_q = tuple(end - start for start, end, _ in pieces)
    seqlens_k = tuple(prefix + end - start for start, end, prefix in pieces)
    slots = [
        torch.arange(*part) for start, end, prefix in pieces for part in ((0, prefix), (start, end))
    ]
    indices = torch.cat([torch.arange(0), *slots])
    cu_seqlens_q, cu_seqlens_k = upload_lists(
        [list(accumulate(lengths, initial=0)) for lengths in (seqlens_q, seqlens_k)], device
    )
    return PrefillPlan(
        cu_seqlens_q,
        cu_seqlens_k,
        upload(indices, device),
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        full=tuple(prefix == start for start, _, prefix in pieces),
    )


def _pieces(length: int, sink_end: int, blocks: tuple[Block, ...]) -> list[tuple[int, int, int]]:
    """Virtual sequences, as (first query, end, keys before the first query)."""
    if not 0 <= sink_end <= length:
        raise ValueError(f"sink_end: expected 0 <= sink_end <= {length}, got {sink_end}")
    at = sink_end
    pieces: list[tuple[int, int, int]] = []
    for number, (start, end) in enumerate(blocks):
        if start != at or not start < end <= length:
            raise ValueError(
                f"blocks[{number}]: expected a block that starts at {at}, where the one before "
                f"ends (the first at sink_end), and ends after its start and at most at {length}, "
                f"got ({start}, {end})"
            )
        pieces.append((start, end, sink_end))
        at = end
    if len(pieces) < 2:
        return [(0, length, 0)] if length else []
    pieces[0] = (0, pieces[0][1], 0)  # the first block sees everything before it, as the sink does
    return [*pieces, (at, length, at)] if at < length else pieces
