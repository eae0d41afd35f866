"""For tests of kernels: random calls, an oracle that never sees a plan, and the error budget.

The oracle reads a dense mask over the cache slots, so that a wrong plan and a wrong kernel are both
seen. The budget is derived: what plain PyTorch loses in the same dtype, twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from pevlm_kernels.types import PrefillPlan


@dataclass(frozen=True)
class Call:
    """The arguments of one :func:`pevlm_kernels.pevlm_prefill`, and what they mean.

    Attributes:
        q: ``[total_q, num_q_heads, head_dim]``
        k_cache: ``[num_slots, num_kv_heads, head_dim]``
        v_cache: ``[num_slots, num_kv_heads, head_dim_v]``
        plan: what the kernel reads.
        mask: ``[total_q, num_slots]`` bool, the slots that a query attends to. What the oracle
            reads.
        softmax_scale: factor on the scores.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    plan: PrefillPlan
    mask: torch.Tensor
    softmax_scale: float

    def to(self, device: str | torch.device) -> Call:
        """The same call on another device."""
        plan = self.plan
        moved = {
            name: getattr(plan, name).to(device)
            for name in ("cu_seqlens_q", "cu_seqlens_k", "kv_indices")
        }
        return dataclasses.replace(
            self,
            q=self.q.to(device),
            k_cache=self.k_cache.to(device),
            v_cache=self.v_cache.to(device),
            plan=dataclasses.replace(plan, **moved),
            mask=self.mask.to(device),
        )

    def poisoned(self) -> Call:
        """With NaN in every slot that no query may read."""
        unread = ~self.mask.any(dim=0)[:, None, None]
        return dataclasses.replace(
            self,
            k_cache=self.k_cache.masked_fill(unread, torch.nan),
            v_cache=self.v_cache.masked_fill(unread, torch.nan),
        )


def random_call(
    plan: PrefillPlan,
    mask: torch.Tensor,
    *,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Call:
    """Normal random tensors for a plan, on the device of its mask.

    They are drawn in fp32 on the host, so that one seed means the same numbers in every dtype and
    on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(tokens, heads, width, generator=generator).to(mask.device, dtype)

    total_q, num_slots = mask.shape
    return Call(
        q=draw(total_q, num_q_heads, head_dim),
        k_cache=draw(num_slots, num_kv_heads, head_dim),
        v_cache=draw(num_slots, num_kv_heads, head_dim if head_dim_v is None else head_dim_v),
        plan=plan,
        mask=mask,
        softmax_scale=head_dim**-0.5,
    )


def random_plan(
    lengths: Sequence[tuple[int, int]],
    *,
    num_slots: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[PrefillPlan, torch.Tensor]:
    """Virtual sequences on shuffled slots, which they may share.

    Args:
        lengths: (queries, keys) of each.
        num_slots: of the cache; at least the most keys.

    Returns:
        The plan, and its mask as in :class:`Call`.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = [torch.randperm(num_slots, generator=generator)[:m] for _, m in lengths]
    mask = torch.zeros(sum(n for n, _ in lengths), num_slots, dtype=torch.bool)
    row = 0
    for (n, m), own in zip(lengths, slots, strict=True):
        for query in range(n):
            mask[row, own[: m - n + query + 1]] = True
            row += 1
    return plan_of_slots([n for n, _ in lengths], slots, device=device), mask.to(device)


def plan_of_slots(
    seqlens_q: Sequence[int],
    slots: Sequence[torch.Tensor],
    *,
    device: str | torch.device = "cpu",
) -> PrefillPlan:
    """The plan of virtual sequences with these query counts and lists of key slots."""
    seqlens_k = [len(own) for own in slots]

    def cumulative(lengths: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    indices = torch.cat([torch.empty(0, dtype=torch.int64), *slots])
    return PrefillPlan(
        cu_seqlens_q=cumulative(seqlens_q),
        cu_seqlens_k=cumulative(seqlens_k),
        kv_indices=indices.to(device),
        seqlens_q=tuple(seqlens_q),
        seqlens_k=tuple(seqlens_k),
        full=(False,) * len(seqlens_k),
    )


def plain_attention(call: Call, dtype: torch.dtype) -> torch.Tensor:
    """Masked attention over the whole cache, one operator a step, each result rounded to ``dtype``.

    In fp64 this is the oracle. Narrower products accumulate in fp32, as matrix units do; PyTorch's
    own on the CPU are slow and differ between machines.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    k, v = (cache.to(wide) for cache in _read_slots(call))
    scores = torch.einsum("nhd,mhd->hnm", call.q.to(wide), k).to(dtype) * call.softmax_scale
    weights = scores.masked_fill(~call.mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights.to(wide), v).to(dtype)


def _fused_attention(call: Call) -> torch.Tensor:
    """PyTorch's own fused function under the dense mask."""
    q, k, v = (part.transpose(0, 1)[None] for part in (call.q, *_read_slots(call)))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=call.mask, scale=call.softmax_scale
    )
    return out[0].transpose(0, 1)


def _read_slots(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches with a head for each query head, and with 0 in the slots that nobody may read:
    those can hold NaN, and 0 * NaN is NaN."""
    unread = ~call.mask.any(dim=0)[:, None, None]
    group = call.q.shape[1] // call.k_cache.shape[1]
    k, v = (
        cache.masked_fill(unread, 0).repeat_interleave(group, dim=1)
        for cache in (call.k_cache, call.v_cache)
    )
    return k, v


def error_budget(call: Call, exact: torch.Tensor) -> float:
    """The largest error that a kernel may make: twice that of plain PyTorch in the call's dtype.

    Plain PyTorch is its operators one by one or its fused function, whichever is further off. Where
    both happen to be exact, it is the rounding of the result itself.
    """
    dtype = call.q.dtype
    rivals = (plain_attention(call, dtype), _fused_attention(call), exact.to(dtype))
    return 2 * max((rival - exact).abs().max().item() for rival in rivals)


def assert_within_budget(out: torch.Tensor, call: Call) -> None:
    """Check a kernel's output against the oracle.

    Raises:
        AssertionError: wrong shape, wrong dtype, a value that is not finite, or too large an error.
    """
    exact = plain_attention(call, torch.float64)
    assert out.shape == exact.shape, f"expected shape {tuple(exact.shape)}, got {tuple(out.shape)}"
    assert out.dtype == call.q.dtype, f"expected {call.q.dtype}, got {out.dtype}"
    assert out.isfinite().all(), "a value is not finite: a slot or an output was never written"
    error, budget = (out - exact).abs().max().item(), error_budget(call, exact)
    assert error <= budget, f"error {error:.3e} exceeds the budget {budget:.3e}"
