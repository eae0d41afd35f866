"""FlashAttention over one packed sequence, without copying a key: a pass over the sink, a pass
inside the blocks, merged by their log-sum-exp.

The blocks tile the sequence, and so do their keys: one causal varlen call. All their queries see
the whole sink: one call without a mask. The question sees everything: one causal call.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch

from pevlm_kernels import flash
from pevlm_kernels.merge import merge_states
from pevlm_kernels.types import PrefillPlan

refusal = flash.refusal


class Parts(NamedTuple):
    """A packed plan, read from its lengths.

    Attributes:
        sink_end: of the keys that all blocks share.
        local_start: the first block that does not see everything before it.
        question_start: after the last block.
        num_tiles: virtual sequences before the question; they tile ``[0, question_start)``.
    """

    sink_end: int
    local_start: int
    question_start: int
    num_tiles: int


def parts_of(plan: PrefillPlan) -> Parts:
    """Where the sink, the blocks and the question of a packed plan lie.

    Raises:
        ValueError: a plan of anything but one packed sequence.
    """
    if plan.seams is None:
        raise ValueError(
            "impl 'flash_merged': expected the plan of one packed sequence (packed_plan), whose "
            "keys are two runs of rows; got a list of cache slots"
        )
    ends = list(accumulate(plan.seqlens_q))
    starts = [0, *ends][:-1]
    local = [i for i, (m, end) in enumerate(zip(plan.seqlens_k, ends, strict=True)) if m != end]
    if not local:
        return Parts(0, ends[0], ends[0], 1)
    first, last = local[0], local[-1]
    sink_end = plan.seqlens_k[first] - plan.seqlens_q[first]
    return Parts(sink_end, starts[first], ends[last], last + 1)


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float,
    v_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`pevlm_kernels.interface.pevlm_prefill`, and :func:`parts_of` for the plan."""
    parts = parts_of(plan)
    k, v = k_cache.to(q.dtype), v_cache.to(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)

    def attend(
        queries: slice, keys: slice, *, causal: bool, tiles: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, m = queries.stop - queries.start, keys.stop - keys.start
        cu_q, cu_k = ((0, *accumulate(tiles or (length,))) for length in (n, m))
        cu_seqlens_q, cu_seqlens_k = (_on_device(plan, cumulative) for cumulative in (cu_q, cu_k))
        return flash.varlen(q.device)(
            q[queries],
            k[keys],
            v[keys],
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max(tiles, default=n),
            max_seqlen_k=max(tiles, default=m),
            softmax_scale=softmax_scale,
            causal=causal,
        )

    tiled = slice(0, parts.question_start)
    sink = slice(0, parts.sink_end)
    local = slice(parts.local_start, parts.question_start)
    question = slice(parts.question_start, q.shape[0])
    tiles = plan.seqlens_q[: parts.num_tiles]
    out[tiled], lse[:, tiled] = attend(tiled, tiled, causal=True, tiles=tiles)
    if parts.sink_end and local.start < local.stop:
        past = attend(local, sink, causal=False)
        out[local], lse[:, local] = merge_states(out[local], lse[:, local], *past)
    if question.start < question.stop:
        out[question], lse[:, question] = attend(question, slice(0, q.shape[0]), causal=True)
    return (out if v_scale == 1 else out * v_scale), lse


def _on_device(plan: PrefillPlan, cumulative: tuple[int, ...]) -> torch.Tensor:
    """``[n + 1]`` int32, uploaded for the first layer."""
    if cumulative not in plan.memo:
        device = plan.cu_seqlens_q.device
        plan.memo[cumulative] = torch.tensor(cumulative, dtype=torch.int32, device=device)
    found: torch.Tensor = plan.memo[cumulative]
    return found
