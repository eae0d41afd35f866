"""The door to the kernels: check what came in, choose, dispatch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from pevlm_kernels.choice import IMPLEMENTATIONS, chosen_implementation, module_of, require
from pevlm_kernels.types import PrefillPlan

Prefill = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def pevlm_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    impl: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention of one layer over the virtual sequences of a plan.

    Args:
        q: ``[total_q, num_q_heads, head_dim]``, floating point.
        k_cache: ``[num_slots, num_kv_heads, head_dim]``, floating point on q's device; keys and
            values of another dtype than q's, fp8 for instance, are converted as they are read.
        v_cache: ``[num_slots, num_kv_heads, head_dim_v]``, likewise.
        plan: of this forward.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` if None.
        k_scale, v_scale: what the stored keys and values have to be multiplied by (fp8).
        impl: one of ``IMPLEMENTATIONS``, or ``auto``: see :func:`chosen_implementation`.
        return_lse: whether to return the log-sum-exp too.

    Returns:
        ``[total_q, num_q_heads, head_dim_v]`` in q's dtype; with ``return_lse`` also
        ``[num_q_heads, total_q]``, the natural log-sum-exp of the scaled scores, at least fp32.

    Raises:
        ValueError: an unknown impl, or tensors that do not fit each other, the plan or the impl.
        ModuleNotFoundError: the impl's library is missing; says how to install it.
    """
    if impl not in (*IMPLEMENTATIONS, "auto"):
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"impl: expected one of {known}, got {impl!r}")
    tensors = (q, k_cache, v_cache)
    _check(*tensors, plan)  # before a refusal reads their shapes
    if impl == "auto":
        impl = chosen_implementation(*tensors)
    else:
        require(impl, *tensors)
    out, lse = bound(impl)(
        *tensors, plan, softmax_scale=softmax_scale, k_scale=k_scale, v_scale=v_scale
    )
    return (out, lse) if return_lse else out


@cache
def bound(impl: str) -> Prefill:
    """One implementation as a function that chooses nothing and looks nothing up, for whoever knows
    that it takes the tensors (:func:`pevlm_kernels.choice.refusal`).

    Returns:
        :func:`pevlm_prefill` without ``impl``, which always returns the log-sum-exp.
    """
    return partial(_prefill, module_of(impl).prefill)


def _prefill(
    prefill: Prefill,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k_cache, v_cache, plan)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not plan.num_seqs:
        return q.new_empty(0, q.shape[1], v_cache.shape[2]), q.new_empty(q.shape[1], 0).float()
    return prefill(q, k_cache, v_cache, plan, softmax_scale=scale * k_scale, v_scale=v_scale)


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: PrefillPlan
) -> None:
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name}: expected [tokens, heads, head_dim], got shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() or tensor.device != q.device:
            raise ValueError(
                f"{name}: expected a floating-point dtype on {q.device}, as q, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if q.shape[0] != plan.total_q:
        raise ValueError(
            f"q: expected {plan.total_q} tokens, as the plan has, got {q.shape[0]}; "
            "the plan is of another forward"
        )
    if k_cache.shape[:2] != v_cache.shape[:2] or k_cache.shape[2] != q.shape[2]:
        raise ValueError(
            f"k_cache, v_cache: expected [slots, kv_heads, {q.shape[2]}] and the same slots and "
            f"heads, got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if not k_cache.shape[1] or q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"q: expected a multiple of {k_cache.shape[1]} key-value heads, "
            f"got {q.shape[1]} query heads"
        )
