"""Attention over virtual sequences. Knows tensors, never SGLang."""

from pevlm_kernels.choice import IMPLEMENTATIONS, chosen_implementation
from pevlm_kernels.interface import bound, pevlm_prefill
from pevlm_kernels.packed import packed_plan, pevlm_attention
from pevlm_kernels.types import PrefillPlan

__all__ = [
    "IMPLEMENTATIONS",
    "PrefillPlan",
    "bound",
    "chosen_implementation",
    "packed_plan",
    "pevlm_attention",
    "pevlm_prefill",
]
