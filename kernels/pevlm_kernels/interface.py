"""The door to the kernels: check what came in, then dispatch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pevlm_kernels import reference, sdpa
from pevlm_kernels.types import PrefillPlan

Implementation = Callable[..., torch.Tensor]

_IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference.prefill,
    "sdpa": sdpa.prefill,
}


def pevlm_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    *,
    softmax_scale: float | None = None,
    impl: str = "sdpa",
) -> torch.Tensor:
    """Attention of one layer over the virtual sequences of a plan.

    Args:
        q: ``[total_q, num_q_heads, head_dim]``, floating point.
        k_cache: ``[num_slots, num_kv_heads, head_dim]``, floating point on q's device; keys and
            values of another dtype than q's are converted as they are gathered.
        v_cache: ``[num_slots, num_kv_heads, head_dim_v]``, likewise.
        plan: of this forward.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` if None.
        impl: ``sdpa`` or ``reference``.

    Returns:
        ``[total_q, num_q_heads, head_dim_v]`` in q's dtype.

    Raises:
        ValueError: an unknown impl, or tensors that do not fit each other or the plan.
    """
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(_IMPLEMENTATIONS)}, got {impl!r}")
    _check(q, k_cache, v_cache, plan)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _IMPLEMENTATIONS[impl](q, k_cache, v_cache, plan, softmax_scale=scale)


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
