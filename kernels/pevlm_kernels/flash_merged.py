"""FlashAttention over virtual sequences, each shared key copied and read once.

Neighbouring blocks begin with the same keys, their sink. So two calls take the place of one: every
virtual sequence against its own keys, causal, and all queries of the blocks against their sink,
without a mask; merged by their log-sum-exp. A virtual sequence that shares nothing, the question
for instance, is whole in the first call.

What it copies of the cache: each block's own keys, each sink once, and all keys of a question. That
is twice the keys of a long video, where ``flash`` copies the sink for every block. Of these copies
at most ``flash.GATHERED_BYTES`` exist at a time, or the keys of one virtual sequence or sink where
those are more. From one packed sequence nothing is copied at all.

What it moves besides is a second output: written, then read with the first one and merged into it.
By bytes, outputs of ``num_q_heads`` against keys of ``num_kv_heads``, that pays where a sink has
more tokens than ``num_q_heads / num_kv_heads`` of its blocks together.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from pevlm_kernels import flash
from pevlm_kernels.flash import Part
from pevlm_kernels.merge import merge_states
from pevlm_kernels.types import PrefillPlan, upload_lists

refusal = flash.refusal


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
    most_keys = flash.gathered_keys(q, k_cache)
    key = ("flash_merged parts", most_keys)
    if key not in plan.memo:
        plan.memo[key] = _own_parts(plan, most_keys), _shared_parts(plan)
    own, shared = plan.memo[key]
    out, lse = flash.attend(q, k_cache, v_cache, own, softmax_scale)
    for part in shared:
        rows = part.rows
        past = flash.attend(q, k_cache, v_cache, [part], softmax_scale, causal=False)
        merged, merged_lse = merge_states(out[rows], lse[:, rows], *past)
        if merged.data_ptr() != out[rows].data_ptr():
            out[rows], lse[:, rows] = merged, merged_lse
    return (out if v_scale == 1 else out * v_scale), lse


def _own_parts(plan: PrefillPlan, most_keys: int) -> list[Part]:
    """All virtual sequences, on the keys that they do not share."""
    dropped = [0] * plan.num_seqs
    for first, end, num_keys in plan.shared:
        dropped[first:end] = [num_keys] * (end - first)
    own = tuple(m - num for m, num in zip(plan.seqlens_k, dropped, strict=True))
    if plan.seams is not None and own == plan.seqlens_q:
        cu_seqlens, longest = plan.cu_seqlens_q, plan.max_seqlen_q
        rows = slice(0, plan.total_q)
        return [Part(rows, rows, cu_seqlens, cu_seqlens, longest, longest)]
    if not plan.shared:
        return flash.parts_of(plan, plan.kv_indices, plan.cu_seqlens_k, own, most_keys)
    # Key j of the shorter list is key j + (all dropped up to its sequence) of the plan's.
    cu_seqlens_k, shifts = upload_lists(
        [list(accumulate(own, initial=0)), list(accumulate(dropped))], plan.kv_indices.device
    )
    total = sum(own)
    of_seq = torch.repeat_interleave(cu_seqlens_k.diff(), output_size=total)
    at = torch.arange(total, device=plan.kv_indices.device) + shifts[of_seq]
    return flash.parts_of(plan, plan.kv_indices[at], cu_seqlens_k, own, most_keys)


def _shared_parts(plan: PrefillPlan) -> list[Part]:
    """The queries that share keys, on those keys."""
    row_at = list(accumulate(plan.seqlens_q, initial=0))
    key_at = list(accumulate(plan.seqlens_k, initial=0))
    lengths = [(row_at[end] - row_at[first], m) for first, end, m in plan.shared]
    cumulative = upload_lists(
        [[0, length] for pair in lengths for length in pair], plan.kv_indices.device
    )
    parts = []
    for i, ((first, end, m), (n, _)) in enumerate(zip(plan.shared, lengths, strict=True)):
        start = key_at[first]
        slots = slice(0, m) if plan.seams is not None else plan.kv_indices[start : start + m]
        rows = slice(row_at[first], row_at[end])
        parts.append(Part(rows, slots, cumulative[2 * i], cumulative[2 * i + 1], n, m))
    return parts
