"""``fa3``: rewritten metadata for FlashAttention-3 over a paged cache.

Each virtual sequence gets a row of a page table with pages of one token, whatever the page size of
the pool: the sink and a block meet at any token. FlashAttention's causal mask is aligned to the
bottom right, as a virtual sequence needs it.
Source: sglang/srt/layers/attention/flashattention_backend.py (``FlashAttentionMetadata``,
``forward_extend``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pevlm_kernels.flash_paged import token_table
from pevlm_sglang.backend import PevlmBackend
from pevlm_sglang.plan import VirtualSequence
from pevlm_sglang.support import UnsupportedError


class PevlmFlashAttention(PevlmBackend):
    """Mixin for ``FlashAttentionBackend`` with FlashAttention-3."""

    page_size: int
    _pevlm_num_seqs: int | None

    def pevlm_check(self) -> None:
        if self.fa_impl_ver != 3:
            raise UnsupportedError(
                f"FlashAttention-{self.fa_impl_ver}: expected FlashAttention-3, whose page tables "
                "take pages of one token; choose --pevlm-base-backend fa3, flashinfer or triton"
            )
        if self._kv_shard_pool is not None:
            raise UnsupportedError(
                "KV sharding: a prefill reads gathered scratch rows there, not cache slots; "
                "serve without it"
            )

    def pevlm_forget(self) -> None:
        self._pevlm_num_seqs = None

    def pevlm_plan(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        plan = self.pevlm_build(sequences, forward_batch)
        metadata = self.forward_metadata
        metadata.cu_seqlens_q = plan.cu_seqlens_q
        metadata.cu_seqlens_k = plan.cu_seqlens_k
        metadata.cache_seqlens_int32 = plan.cu_seqlens_k.diff()
        metadata.max_seq_len_q = plan.max_seqlen_q
        metadata.max_seq_len_k = plan.max_seqlen_k
        metadata.page_table = token_table(plan)
        self._pevlm_num_seqs = plan.num_seqs

    def get_paged_mha_kv_cache(self, layer: Any, **kwargs: Any) -> Any:
        """The pool in pages of one token while a plan is in force."""
        if self._pevlm_num_seqs is None:
            return super().get_paged_mha_kv_cache(layer, **kwargs)
        page_size, self.page_size = self.page_size, 1
        try:
            return super().get_paged_mha_kv_cache(layer, **kwargs)
        finally:
            self.page_size = page_size

    def prepare_paged_mha_query(
        self, *args: Any, logical_batch_size: int, **kwargs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """fp8 scales have a row a sequence of the kernel's batch, so a row a virtual one."""
        if self._pevlm_num_seqs is not None:
            logical_batch_size = self._pevlm_num_seqs
        return super().prepare_paged_mha_query(
            *args, logical_batch_size=logical_batch_size, **kwargs
        )
