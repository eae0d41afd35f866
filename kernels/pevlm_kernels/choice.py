"""The implementations, and which one ``impl="auto"`` means.

A module is loaded when its implementation is asked for, so that none of their libraries is needed
by the others.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "reference": "pevlm_kernels.reference",
    "sdpa": "pevlm_kernels.sdpa",
    "triton": "pevlm_kernels.triton_prefill",
    "flash": "pevlm_kernels.flash",
}
"""Name → the module with its ``prefill`` and ``refusal``."""

ON_GPU = ("flash", "triton")
"""The order on a GPU, a prediction: vendors' kernels reach more of the hardware than portable ones.
``benchmarks/bench_attention.py`` measures it (column ``ms``, all implementations side by side)."""

PREFERENCE = (*ON_GPU, "sdpa", "reference")
"""``auto`` takes the first that takes the tensors."""

_NO_TRITON = "triton is not installed: pip install triton"


@cache
def module_of(impl: str) -> Any:
    return importlib.import_module(IMPLEMENTATIONS[impl])


def refusal(impl: str, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why an implementation cannot take these tensors here; None if it can."""
    if impl == "triton" and not is_installed("triton"):
        return _NO_TRITON
    reason: str | None = module_of(impl).refusal(q, k_cache, v_cache)
    return reason


def require(impl: str, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Check that an implementation takes these tensors.

    Raises:
        ValueError: it does not; says why.
        ModuleNotFoundError: its library is missing; says how to install it.
    """
    if reason := refusal(impl, q, k_cache, v_cache):
        error = ModuleNotFoundError if reason == _NO_TRITON else ValueError
        raise error(f"impl {impl!r}: {reason}")


def chosen_implementation(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str:
    """What ``impl="auto"`` takes for these tensors, by the capability of their device, their dtypes
    and widths, and the libraries at hand. Logged when it is chosen for the first time."""
    refusals: list[str] = []
    for impl in PREFERENCE:
        reason = refusal(impl, q, k_cache, v_cache)
        if reason is None:
            _log_once(impl, tuple(refusals))
            return impl
        refusals.append(f"{impl}: {reason}")
    raise AssertionError("reference takes everything")


@cache
def is_installed(name: str) -> bool:
    """Whether a module could be imported; only its parent packages are. Looked up once: where the
    parent is broken, each attempt takes tens of milliseconds."""
    try:
        return find_spec(name) is not None
    except ImportError:  # of a parent
        return False


@cache
def _log_once(impl: str, refusals: tuple[str, ...]) -> None:
    logger.info("impl auto takes %s (%s)", impl, "; ".join(refusals) or "first choice")
