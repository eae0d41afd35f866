"""A plan as calls of FlashAttention's varlen function, in bounded room.

What is gathered is cut into calls of so many keys and queries as fit; a virtual sequence with more
keys than that into runs of keys, whose results are merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from pevlm_kernels.types import PrefillPlan, upload_lists

SCRATCH_BYTES = 512 * 2**20
"""What :func:`pevlm_kernels.flash.prefill` allocates at most besides its results, whatever the
lengths: one half for the results of one call of the library; the other for gathered keys and
values, and once they are gone for merging. The library's own workspace is not counted."""

TABLE_ENTRIES = 2**24
"""Of one page table, int32, or one row where that is more. They are built once a forward: 4 MB for
a question of a million tokens."""


class Room(NamedTuple):
    """What one call of the library may have.

    Attributes:
        queries: in all.
        keys: gathered ones; at least as many.
        paged: whether full virtual sequences are read where they lie.
    """

    queries: int
    keys: int
    paged: bool


def room_for(q: torch.Tensor, k_cache: torch.Tensor, *, paged: bool) -> Room:
    """How much of these tensors ``SCRATCH_BYTES`` hold.

    Args:
        paged: whether the library takes pages of one token here.
    """
    same = k_cache.dtype == q.dtype
    # Keys and values in q's dtype, and one of the two as it is stored while it is converted.
    of_key = 2 * q.element_size() + (0 if same else k_cache.element_size())
    of_query = q.shape[2] * q.element_size() + 4 * 4  # and log-sum-exps
    keys = SCRATCH_BYTES // 2 // (k_cache.shape[1] * k_cache.shape[2] * of_key)
    queries = SCRATCH_BYTES // 2 // (q.shape[1] * of_query)
    # FlashAttention-4 pages heads of 16 up to 128; wider ones are gathered, on 3 too.
    fits = same and not q.shape[2] % 16 and q.shape[2] <= 128
    return Room(max(1, min(queries, keys)), max(1, keys), paged and fits)


class Span(NamedTuple):
    """Queries ``row : row + n`` against the keys ``key : key + m`` of the plan's list of slots;
    causal, or without a mask beside an earlier causal span of the same queries."""

    row: int
    n: int
    key: int
    m: int
    causal: bool
    paged: bool


class Call(NamedTuple):
    """Virtual sequences, or parts of them, of one call of the library.

    Attributes:
        rows: their queries.
        slots: their keys, ``[total_k]``.
        table: of their keys, if they are read where they lie, ``[num_seqs, max_seqlen_k]`` int32.
        cu_seqlens_q, cu_seqlens_k: ``[num_seqs + 1]`` int32, from 0.
        seqlens_k: ``[num_seqs]`` int32.
        max_seqlen_q, max_seqlen_k: on the host.
        causal: False for a run of keys that all queries see, to be merged.
    """

    rows: slice
    slots: torch.Tensor
    table: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool


def spans_of(plan: PrefillPlan, room: Room) -> Iterator[Span]:
    """Cut virtual sequences that have too many queries, and gathered ones with too many keys."""
    row = key = 0
    for n, m, full in zip(plan.seqlens_q, plan.seqlens_k, plan.full, strict=True):
        paged = room.paged and full
        for first in range(0, n, room.queries):
            end = min(first + room.queries, n)
            rows = (row + first, end - first)
            seen = m - n + end
            tail = seen if paged else min(seen, room.keys)
            yield Span(*rows, key + seen - tail, tail, True, paged)
            for stop in range(seen - tail, 0, -room.keys):
                start = max(0, stop - room.keys)
                yield Span(*rows, key + start, stop - start, False, False)
        row, key = row + n, key + m


def calls_of(plan: PrefillPlan, room: Room) -> list[Call]:
    """The calls of one layer, in which the causal one of a query comes first."""
    groups: list[list[Span]] = []
    for span in spans_of(plan, room):
        if not groups or not _joins(groups[-1], span, room):
            groups.append([])
        groups[-1].append(span)
    lengths = [[getattr(span, of) for span in group] for group in groups for of in ("n", "m")]
    lists = [list(accumulate(numbers, initial=0)) for numbers in lengths]
    uploaded = upload_lists(lists, plan.kv_indices.device)
    calls = []
    for i, group in enumerate(groups):
        first, last = group[0], group[-1]
        (cu_seqlens_q, cu_seqlens_k), (n, m) = uploaded[2 * i :][:2], lengths[2 * i :][:2]
        rows, slots = slice(first.row, last.row + last.n), slice(first.key, last.key + last.m)
        table = token_table(plan.kv_indices[slots], cu_seqlens_k, m) if first.paged else None
        calls.append(
            Call(
                rows,
                plan.kv_indices[slots],
                table,
                cu_seqlens_q,
                cu_seqlens_k,
                cu_seqlens_k.diff(),
                max(n),
                max(m),
                first.causal,
            )
        )
    return calls


def _joins(group: Sequence[Span], span: Span, room: Room) -> bool:
    """Whether a span can be of the same call: its queries and keys follow, and there is room."""
    first, last = group[0], group[-1]
    if span[4:] != last[4:] or (span.row, span.key) != (last.row + last.n, last.key + last.m):
        return False
    if span.row + span.n - first.row > room.queries:
        return False
    if span.paged:
        return (len(group) + 1) * max(other.m for other in (*group, span)) <= TABLE_ENTRIES
    return span.key + span.m - first.key <= room.keys


def token_table(
    slots: torch.Tensor, cu_seqlens_k: torch.Tensor, seqlens_k: Sequence[int]
) -> torch.Tensor:
    """Lists of cache slots as a table of pages of one token.

    Args:
        slots: ``[total_k]`` int64, one list after the other.
        cu_seqlens_k: ``[num_seqs + 1]`` int32, where they begin.
        seqlens_k: their lengths, on the host.

    Returns:
        ``[num_seqs, max(seqlens_k)]`` int32, padded with 0.
    """
    # Row i of the table starts at i * width, its list at cu_seqlens_k[i]. Written by place and not
    # by a mask, whose number of places the host would have to wait for.
    device, width, total = slots.device, max(seqlens_k), len(slots)
    starts = torch.arange(len(seqlens_k), device=device) * width - cu_seqlens_k[:-1]
    of_seq = torch.repeat_interleave(cu_seqlens_k.diff(), output_size=total)
    table = torch.zeros(len(seqlens_k) * width, dtype=torch.int32, device=device)
    table[torch.arange(total, device=device) + starts[of_seq]] = slots.to(torch.int32)
    return table.view(-1, width)
