"""``flashinfer``: an own paged prefill wrapper, planned on virtual sequences.

SGLang serves multimodal models through the paged wrapper, planned with pages of one token, whatever
the page size of the pool; so are virtual sequences.
Source: sglang/srt/layers/attention/flashinfer_backend.py (``PrefillMetadata``,
``FlashInferIndicesUpdaterPrefill.call_begin_forward``, ``forward_extend``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from pevlm_kernels.flashinfer import host_lists
from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.attention.plan import VirtualSequence
from pevlm_sglang.errors import UnsupportedError


class PevlmFlashInfer(PevlmBackend):
    """Mixin for ``FlashInferAttnBackend``."""

    forward_metadata: Any

    def pevlm_check(self) -> None:
        if self.num_wrappers != 1:
            raise UnsupportedError(
                "flashinfer with a wrapper for sliding-window or cross-attention: expected plain "
                "causal attention; serve this model without --attention-backend pevlm"
            )
        if self.prefill_uses_dequant_workspace:
            raise UnsupportedError(
                "flashinfer with a dequantised FP4 cache: a prefill reads a workspace there, not "
                "cache slots; choose another --kv-cache-dtype"
            )
        # Not one of SGLang's own wrappers: those are re-planned for every dense batch.
        paged = type(self.prefill_wrappers_paged[0])
        self._pevlm_wrapper = paged(self.workspace_buffer, "NHD", backend=self.prefill_backend)

    def pevlm_preference(self, capability: tuple[int, int] | None, narrow: bool) -> tuple[str, ...]:
        """A prediction; nothing of it was measured. FlashInfer plans the same virtual sequences
        itself, so nothing is gained but on data-centre Blackwell (sm_100 to sm_110): its paged
        kernel for pages of one token is Ampere's there, and FlashAttention-4 is written for that
        GPU's tensor cores."""
        blackwell = capability is not None and capability[0] in (10, 11)
        return ("flash", "base") if blackwell else ("base",)

    def pevlm_rewrite(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        plan = self.pevlm_build(sequences, forward_batch)
        updater = self.indices_updater_prefill
        cu_seqlens_q, cu_seqlens_k, last_page_len = host_lists(plan)
        self._pevlm_wrapper.begin_forward(
            cu_seqlens_q,
            cu_seqlens_k,
            plan.kv_indices.to(torch.int32),
            last_page_len,
            updater.num_qo_heads,
            updater.num_kv_heads,
            updater.head_dim,
            1,
            q_data_type=updater.q_data_type,
            kv_data_type=updater.data_type,
            non_blocking=True,
            fixed_split_size=self.prefill_split_tile_size,
        )
        self.forward_metadata = dataclasses.replace(
            self.forward_metadata,
            prefill_wrappers=[self._pevlm_wrapper],
            use_ragged=False,
            extend_no_prefix=False,
        )
