"""``torch_native``: for machines without a GPU.

Source: sglang/srt/layers/attention/torch_native_backend.py, whose own prefill recomputes the cached
prefix's queries and takes no metadata to rewrite.
"""

from __future__ import annotations

import torch

from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.errors import UnsupportedError


class PevlmTorchNative(PevlmBackend):
    """Mixin for ``TorchNativeAttnBackend``."""

    pevlm_base = "torch_native"
    pevlm_without_base = "expected another base backend: torch_native takes no metadata to rewrite"
    pevlm_stores_scaled = False

    def pevlm_check(self) -> None:
        if torch.device(self.device).type != "cpu":
            raise UnsupportedError(
                f"torch_native on {self.device}: PEVLM's kernel for it runs on the CPU; choose "
                "--pevlm-base-backend fa3, flashinfer or triton"
            )
