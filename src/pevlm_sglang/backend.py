"""The mixin on SGLang's attention backend: plan in ``init_forward_metadata``, run in the base.

One mixin a base backend, in ``bases/``; decode, CUDA graphs and speculative decoding stay the
base's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from pevlm_kernels import PrefillPlan
from pevlm_sglang.observe import TEXT, Observer, RequestLayout
from pevlm_sglang.plan import VirtualSequence, build_plan, virtual_sequences

# SGLang rewrites MIXED to EXTEND before most backends see it. The other modes that `is_extend()`
# counts in hold no prompt tokens (draft extend, target verify) or are refused at start (split
# prefill of pdmux, dLLM).
PREFILL_MODES = (ForwardMode.EXTEND, ForwardMode.MIXED)


class PrefillBatch(NamedTuple):
    """The requests of a prefill batch; a decode row of a mixed batch extends by one token."""

    requests: list[RequestLayout]
    prefix_lens: list[int]
    extend_lens: list[int]

    @property
    def may_be_sparse(self) -> bool:
        """Whether a request goes beyond its first sparse token. False is certain: all dense."""
        return any(
            r.layout.first_sparse is not None and p + n > r.layout.first_sparse
            for r, p, n in zip(*self, strict=True)
        )

    def sequences(self) -> list[VirtualSequence]:
        """The virtual sequences of the batch."""
        layouts = [request.layout for request in self.requests]
        return virtual_sequences(layouts, self.prefix_lens, self.extend_lens)


def read_batch(forward_batch: Any) -> PrefillBatch | None:
    """The prefill batch in SGLang's ``ForwardBatch``; None in any other mode.

    Raises:
        RuntimeError: a multimodal request that never got a layout. Serving it with full attention
            would be a lie, so the server stops instead.
    """
    if forward_batch.forward_mode not in PREFILL_MODES:
        return None
    prefix_lens = _host_list(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_prefix_lens)
    extend_lens = _host_list(forward_batch.extend_seq_lens_cpu, forward_batch.extend_seq_lens)
    requests = []
    for mm_inputs in forward_batch.mm_inputs or [None] * len(extend_lens):
        request = TEXT if mm_inputs is None else getattr(mm_inputs, "pevlm", None)
        if request is None:
            raise RuntimeError(
                "PEVLM: a multimodal request reached the forward without a layout, past "
                "Scheduler._add_request_to_queue; please report how it was sent"
            )
        requests.append(request)
    return PrefillBatch(requests, prefix_lens, extend_lens)


def _host_list(on_host: Any, on_device: Any) -> list[int]:
    values = on_device if on_host is None else on_host
    return values.tolist() if hasattr(values, "tolist") else list(values)


class PevlmBackend(AttentionBackend):
    """Mixin in front of a base backend's class.

    Attributes:
        pevlm_observer: set when the class is put on.
    """

    pevlm_observer: Observer
    req_to_token_pool: Any

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """SGLang's entry point of an eager forward, once before its layers."""
        super().init_forward_metadata(forward_batch)
        self.pevlm_forget()
        batch = read_batch(forward_batch)
        if batch is None:
            return
        sequences = batch.sequences() if batch.may_be_sparse else []
        if all(sequence.piece.is_full for sequence in sequences):
            self.pevlm_observer.dense_batch(*batch)
            return
        self.pevlm_plan(sequences, forward_batch)
        self.pevlm_observer.sparse_batch(batch.requests, sequences)

    def pevlm_check(self) -> None:
        """Look at the constructed base once, before it serves.

        Raises:
            UnsupportedError: a mode of the base that PEVLM cannot build on.
        """

    def pevlm_forget(self) -> None:
        """Drop the plan of the forward before."""

    def pevlm_plan(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        """Make the layers of this forward run these virtual sequences."""
        raise NotImplementedError

    def pevlm_build(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> PrefillPlan:
        """The plan of these virtual sequences on the pool's request table."""
        return build_plan(
            sequences, self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
        )

    def can_run_prefill_cuda_graph(self, forward_batch: Any) -> bool:
        """SGLang's veto on a prefill CUDA graph: a graph of kind FULL has full attention baked in,
        so a batch with LOCAL tokens runs eagerly."""
        batch = read_batch(forward_batch)
        sparse = batch is not None and batch.may_be_sparse
        return not sparse

    def vote_prefill_cuda_graph(self, batch: Any) -> bool:
        """The same veto at schedule time, for data-parallel attention: no prompt with LOCAL tokens
        in SGLang's ``ScheduleBatch``."""
        layouts = (getattr(req.multimodal_inputs, "pevlm", TEXT) for req in batch.reqs)
        sparse = any(request.dense_reason is None for request in layouts)
        return not sparse
