"""``flashinfer``: an own paged prefill wrapper, planned on virtual sequences.

SGLang serves multimodal models through the paged wrapper, planned with pages of one token, whatever
the page size of the pool; so are virtual sequences.
Source: sglang/srt/layers/attention/flashinfer_backend.py (``PrefillMetadata``,
``FlashInferIndicesUpdaterPrefill.call_begin_forward``, ``forward_extend``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from pevlm_kernels.types import PrefillPlan, pinned
from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.attention.plan import VirtualSequence
from pevlm_sglang.errors import UnsupportedError


class PevlmFlashInfer(PevlmBackend):
    """Mixin for ``FlashInferAttnBackend``."""

    pevlm_base = "flashinfer"
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


def host_lists(plan: PrefillPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``cu_seqlens_q``, ``cu_seqlens_k`` and ``num_seqs`` page lengths of 1, int32 on the host.
    FlashInfer plans there: of tensors on the device it would make copies, and wait for them."""
    device = plan.kv_indices.device
    lists = [list(accumulate(lengths, initial=0)) for lengths in (plan.seqlens_q, plan.seqlens_k)]
    cu_seqlens_q, cu_seqlens_k, last_page_len = (
        pinned(torch.tensor(numbers, dtype=torch.int32), device)
        for numbers in (*lists, [1] * plan.num_seqs)
    )
    return cu_seqlens_q, cu_seqlens_k, last_page_len
