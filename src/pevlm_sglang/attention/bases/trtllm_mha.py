"""``trtllm_mha``: SGLang's default on data-centre Blackwell.

Its page tables hold whole pages of 16 tokens and more, so its own prefill cannot run virtual
sequences. Its pool is read by other kernels like any other: a row a token.
Source: sglang/srt/layers/attention/trtllm_mha_backend.py (``forward_extend``, ``_get_bmm_scales``).
"""

from __future__ import annotations

from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.errors import UnsupportedError


class PevlmTrtllmMha(PevlmBackend):
    """Mixin for ``TRTLLMHAAttnBackend``."""

    pevlm_base = "trtllm_mha"
    pevlm_without_base = (
        "expected another base backend: trtllm_mha's page tables cannot point at single tokens"
    )

    def pevlm_check(self) -> None:
        if self.prefill_uses_native_fp4 or self.prefill_uses_dequant_workspace:
            raise UnsupportedError(
                "trtllm_mha with an FP4 cache: its keys and values are not read token by token; "
                "choose another --kv-cache-dtype"
            )
