"""Attention over virtual sequences. Knows tensors, never SGLang."""

from pevlm_kernels.interface import pevlm_prefill
from pevlm_kernels.types import PrefillPlan

__all__ = ["PrefillPlan", "pevlm_prefill"]
