"""The mixin on SGLang's attention backend: plan in ``init_forward_metadata``, run in
``forward_extend``.

A forward with LOCAL tokens stores its keys and values as the base does and hands the pool to the
kernel that was chosen at start, one path for every base; or, with the prefill kernel ``base``, the
base runs its own kernel on metadata that its mixin in ``bases`` has rewritten. Every other
forward, decode, CUDA graphs and speculative decoding stay the base's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from pevlm_kernels import PrefillPlan
from pevlm_sglang.attention.plan import VirtualSequence, build_plan, virtual_sequences
from pevlm_sglang.observe.observer import TEXT, Observer, RequestLayout

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
    def sparse_sequences(self) -> list[VirtualSequence]:
        """The virtual sequences; none where all of them are full causal attention, as text is, and
        what stands behind a video."""
        if not any(
            r.layout.first_sparse is not None and p + n > r.layout.first_sparse
            for r, p, n in zip(*self, strict=True)
        ):
            return []
        layouts = [request.layout for request in self.requests]
        sequences = virtual_sequences(layouts, self.prefix_lens, self.extend_lens)
        return [] if all(sequence.piece.is_full for sequence in sequences) else sequences


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
        pevlm_observer: set when the mixin is attached.
        pevlm_kernel: what computes a forward with LOCAL tokens, an implementation of
            ``pevlm_kernels`` or ``base``; likewise.
        pevlm_prefill: the former as a function, see :func:`pevlm_kernels.bound`; likewise.
        pevlm_base: the base's name in the table of :mod:`pevlm_sglang.attention.kernel_choice`.
        pevlm_without_base: why this base's own kernel cannot run virtual sequences; empty where it
            can.
        pevlm_stores_scaled: whether the base divides keys and values by the layer's scales when it
            stores them in a narrower dtype.
    """

    pevlm_observer: Observer
    pevlm_kernel: str
    pevlm_prefill: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    pevlm_base: str
    pevlm_without_base: str = ""
    pevlm_stores_scaled: bool = True
    req_to_token_pool: Any
    token_to_kv_pool: Any
    _pevlm_plan: PrefillPlan | None

    def pevlm_check(self) -> None:
        """Look at the constructed base once, before it serves.

        Raises:
            UnsupportedError: a mode of the base that PEVLM cannot build on.
        """

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """SGLang's entry point of an eager forward, once before its layers."""
        super().init_forward_metadata(forward_batch)
        self.pevlm_forget()
        batch = read_batch(forward_batch)
        if batch is None:
            return
        if not (sequences := batch.sparse_sequences):
            self.pevlm_observer.dense_batch(*batch)
            return
        self.pevlm_plan(sequences, forward_batch)
        self.pevlm_observer.sparse_batch(batch.requests, sequences)

    def init_forward_metadata_out_graph(self, *args: Any, **kwargs: Any) -> None:
        """SGLang's entry point of a forward in a CUDA graph, which is never a sparse prefill."""
        self.pevlm_forget()
        super().init_forward_metadata_out_graph(*args, **kwargs)

    def pevlm_forget(self) -> None:
        """Drop the plan of the forward before."""
        self._pevlm_plan = None

    def pevlm_plan(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        """Make the layers of this forward run these virtual sequences."""
        if self.pevlm_kernel == "base":
            self.pevlm_rewrite(sequences, forward_batch)
        else:
            self._pevlm_plan = self.pevlm_build(sequences, forward_batch)

    def pevlm_rewrite(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        """Make the base's own kernel run these virtual sequences."""
        raise NotImplementedError(self.pevlm_without_base)

    def pevlm_build(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> PrefillPlan:
        """The plan of these virtual sequences on the pool's request table."""
        return build_plan(
            sequences, self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
        )

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """SGLang's attention of one layer over a prefill batch.

        Args:
            q: ``[total_q, num_q_heads * head_dim]``
            k, v: ``[total_q, num_kv_heads, head_dim]``, or None where they are in the cache.
            layer: SGLang's ``RadixAttention``.

        Returns:
            ``[total_q, num_q_heads * head_dim_v]``, as the base's.

        Raises:
            NotImplementedError: an option of SGLang's that changes the mask or the scores. The
                server stops: to leave it out would be another model.
        """
        if self._pevlm_plan is None:
            base: torch.Tensor = super().forward_extend(
                q, k, v, layer, forward_batch, save_kv_cache, **options
            )
            return base
        given = [name for name, value in options.items() if not (value is None or value is False)]
        if given:
            raise NotImplementedError(
                f"--pevlm-prefill-kernel {self.pevlm_kernel}: the model calls its attention with "
                f"{', '.join(given)}, expected none of SGLang's options; use "
                "--pevlm-prefill-kernel base"
            )
        pool = self.token_to_kv_pool
        scales = (layer.k_scale, layer.v_scale) if self.pevlm_stores_scaled else ()
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v, *scales)
        k_cache = pool.get_key_buffer(layer.layer_id)
        # SGLang's pool divides by the scales only what it also has to round.
        scaled = scales and layer.k_scale is not None and k_cache.dtype != q.dtype
        out, _ = self.pevlm_prefill(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k_cache,
            pool.get_value_buffer(layer.layer_id),
            self._pevlm_plan,
            softmax_scale=layer.scaling,
            k_scale=layer.k_scale_float if scaled else 1.0,
            v_scale=layer.v_scale_float if scaled else 1.0,
        )
        return out.view(q.shape[0], -1)

    def can_run_prefill_cuda_graph(self, forward_batch: Any) -> bool:
        """SGLang's veto on a prefill CUDA graph: a graph of kind FULL has full attention baked in,
        so a batch with LOCAL tokens runs eagerly."""
        batch = read_batch(forward_batch)
        return batch is None or not batch.sparse_sequences

    def vote_prefill_cuda_graph(self, batch: Any) -> bool:
        """The same veto at schedule time, for data-parallel attention, of SGLang's
        ``ScheduleBatch``."""
        requests = [getattr(req.multimodal_inputs, "pevlm", TEXT) for req in batch.reqs]
        return not PrefillBatch(requests, batch.prefix_lens, batch.extend_lens).sparse_sequences
