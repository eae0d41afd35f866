"""``fa3`` and ``fa4``: FlashAttention over a paged cache.

FlashAttention-3's own prefill takes rewritten metadata: each virtual sequence gets a row of a page
table with pages of one token, whatever the page size of the pool, since the sink and a block meet
at any token. Its causal mask is aligned to the bottom right, as a virtual sequence needs it.
FlashAttention-4's page tables cannot point at single tokens.
Source: sglang/srt/layers/attention/flashattention_backend.py (``FlashAttentionMetadata``,
``forward_extend``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pevlm_kernels.flash_calls import token_table
from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.attention.plan import VirtualSequence
from pevlm_sglang.errors import UnsupportedError


class PevlmFlashAttention(PevlmBackend):
    """Mixin for ``FlashAttentionBackend``."""

    pevlm_base = "fa3"
    page_size: int
    _pevlm_num_seqs: int | None

    def pevlm_check(self) -> None:
        if self.fa_impl_ver != 3:
            self.pevlm_base = "fa4"
            self.pevlm_without_base = (
                f"expected FlashAttention-3, whose page tables take pages of one token, got "
                f"FlashAttention-{self.fa_impl_ver}"
            )
        if self._kv_shard_pool is not None:
            raise UnsupportedError(
                "KV sharding: a prefill reads gathered scratch rows there, not cache slots; "
                "serve without it"
            )

    def pevlm_forget(self) -> None:
        super().pevlm_forget()
        self._pevlm_num_seqs = None

    def pevlm_rewrite(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        plan = self.pevlm_build(sequences, forward_batch)
        metadata = self.forward_metadata
        metadata.cu_seqlens_q = plan.cu_seqlens_q
        metadata.cu_seqlens_k = plan.cu_seqlens_k
        metadata.cache_seqlens_int32 = plan.cu_seqlens_k.diff()
        metadata.max_seq_len_q = plan.max_seqlen_q
        metadata.max_seq_len_k = plan.max_seqlen_k
        metadata.page_table = token_table(plan.kv_indices, plan.cu_seqlens_k, plan.seqlens_k)
        self._pevlm_num_seqs = plan.num_seqs

    def get_paged_mha_kv_cache(self, layer: Any, **kwargs: Any) -> Any:
        """The pool in pages of one token while the metadata is rewritten."""
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
