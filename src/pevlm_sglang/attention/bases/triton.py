"""``triton``: rewritten metadata for SGLang's own extend kernel.

The kernel takes, a sequence, a list of cached slots and then the new keys and values themselves,
causal. A virtual sequence is exactly that: its key ranges but for its own tokens, and its own
tokens. Keys that this forward computes are in the cache by then: ``forward_extend`` stores first.
Source: sglang/srt/layers/attention/triton_backend.py (``ForwardMetadata``, ``forward_extend``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.attention.plan import VirtualSequence, slot_lists


class PevlmTriton(PevlmBackend):
    """Mixin for ``TritonAttnBackend``."""

    pevlm_base = "triton"

    def pevlm_rewrite(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        metadata = self.forward_metadata
        lengths = [s.piece.num_queries for s in sequences]
        lists = slot_lists(
            lengths,
            [(s.row, s.piece.keys_before_start()) for s in sequences],
            self.req_to_token,
            forward_batch.req_pool_indices,
        )
        metadata.qo_indptr = lists.cu_seqlens_q.to(metadata.qo_indptr.dtype)
        metadata.kv_indptr = lists.cu_seqlens_k.to(metadata.kv_indptr.dtype)
        metadata.kv_indices = lists.kv_indices.to(metadata.kv_indices.dtype)
        metadata.max_extend_len = max(lengths)
