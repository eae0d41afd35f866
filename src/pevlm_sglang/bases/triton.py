"""``triton``: rewritten metadata for SGLang's own extend kernel.

The kernel takes, a sequence, a list of cached slots and then the new keys and values themselves,
causal. A virtual sequence is exactly that: its key ranges but for its own tokens, and its own
tokens. Keys that this forward computes are in the cache by then: ``forward_extend`` stores first.
Source: sglang/srt/layers/attention/triton_backend.py (``ForwardMetadata``, ``forward_extend``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pevlm_sglang.backend import PevlmBackend
from pevlm_sglang.plan import VirtualSequence, cumulative, gather_slots


class PevlmTriton(PevlmBackend):
    """Mixin for ``TritonAttnBackend``."""

    def pevlm_plan(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        metadata = self.forward_metadata
        req_to_token = self.req_to_token
        lengths = [s.piece.num_queries for s in sequences]
        cached = [s.piece.num_keys - n for s, n in zip(sequences, lengths, strict=True)]
        metadata.qo_indptr = cumulative(lengths, req_to_token.device).to(metadata.qo_indptr.dtype)
        metadata.kv_indptr = cumulative(cached, req_to_token.device).to(metadata.kv_indptr.dtype)
        metadata.kv_indices = gather_slots(
            ((s.row, key_range) for s in sequences for key_range in s.piece.keys_before_start()),
            req_to_token,
            forward_batch.req_pool_indices,
        ).to(metadata.kv_indices.dtype)
        metadata.max_extend_len = max(lengths)
