"""FlashAttention over one packed sequence, without copying a key.

The virtual sequences tile the sequence, and so do their own keys: one causal varlen call. What came
before a virtual sequence is the sink for all blocks, and everything for the question: a call
without a mask for each of the two, merged by their log-sum-exp.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch

from pevlm_kernels import flash
from pevlm_kernels.merge import merge_states
from pevlm_kernels.types import PrefillPlan

refusal = flash.refusal


class Past(NamedTuple):
    """Neighbouring queries that see the same keys before their own: the first ``num_keys``."""

    start: int
    end: int
    num_keys: int


def pasts_of(plan: PrefillPlan) -> list[Past]:
    """What came before the virtual sequences of a packed plan: for the blocks, for the question.

    Raises:
        ValueError: a plan of anything but one packed sequence.
    """
    require_packed(plan, "flash_merged")
    pasts: list[Past] = []
    ends = accumulate(plan.seqlens_q)
    for n, m, end in zip(plan.seqlens_q, plan.seqlens_k, ends, strict=True):
        if m == n:
            continue
        if pasts and pasts[-1].end == end - n and pasts[-1].num_keys == m - n:
            pasts[-1] = pasts[-1]._replace(end=end)
        else:
            pasts.append(Past(end - n, end, m - n))
    return pasts


def require_packed(plan: PrefillPlan, impl: str) -> None:
    """Check that a plan is of one packed sequence.

    Raises:
        ValueError: it is not.
    """
    if plan.seams is None:
        raise ValueError(
            f"impl {impl!r}: expected the plan of one packed sequence (packed_plan), whose keys "
            "are two runs of rows; got a list of cache slots"
        )


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float,
    v_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`pevlm_kernels.interface.pevlm_prefill`, and :func:`pasts_of` for the plan."""
    pasts = pasts_of(plan)
    k, v = k_cache.to(q.dtype), v_cache.to(q.dtype)
    varlen = flash.varlen(q.device)
    out, lse = varlen(
        q,
        k,
        v,
        cu_seqlens_q=plan.cu_seqlens_q,
        cu_seqlens_k=plan.cu_seqlens_q,
        max_seqlen_q=plan.max_seqlen_q,
        max_seqlen_k=plan.max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=True,
    )
    for start, end, num_keys in pasts:
        rows = slice(start, end)
        past = varlen(
            q[rows],
            k[:num_keys],
            v[:num_keys],
            cu_seqlens_q=_one_sequence(plan, end - start),
            cu_seqlens_k=_one_sequence(plan, num_keys),
            max_seqlen_q=end - start,
            max_seqlen_k=num_keys,
            softmax_scale=softmax_scale,
            causal=False,
        )
        merged, merged_lse = merge_states(out[rows], lse[:, rows], *past)
        if merged.data_ptr() != out[rows].data_ptr():
            out[rows], lse[:, rows] = merged, merged_lse
    return (out if v_scale == 1 else out * v_scale), lse


def _one_sequence(plan: PrefillPlan, length: int) -> torch.Tensor:
    """``[2]`` int32 cumulative lengths, uploaded for the first layer."""
    key = ("one sequence", length)
    if key not in plan.memo:
        device = plan.cu_seqlens_q.device
        plan.memo[key] = torch.tensor([0, length], dtype=torch.int32, device=device)
    found: torch.Tensor = plan.memo[key]
    return found
