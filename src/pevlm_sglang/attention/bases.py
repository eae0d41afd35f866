"""One mixin a base backend of SGLang: what it may build on, and how its own prefill is told to run
virtual sequences.

Sources: ``flashattention_backend.py``, ``flashinfer_backend.py``, ``trtllm_mha_backend.py``,
``triton_backend.py`` and ``torch_native_backend.py`` in sglang/srt/layers/attention: their metadata
and ``forward_extend``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from pevlm_kernels import bound
from pevlm_kernels.flash_calls import token_table
from pevlm_kernels.types import pinned
from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.attention.kernel_choice import BASE, choose
from pevlm_sglang.attention.plan import VirtualSequence, slot_lists
from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.observe.observer import Observer


class PevlmFlashAttention(PevlmBackend):
    """``fa3`` and ``fa4``: FlashAttention over a paged cache.

    FlashAttention-3's own prefill takes rewritten metadata: each virtual sequence gets a row of a
    page table with pages of one token, whatever the page size of the pool, since the sink and a
    block meet at any token. FlashAttention-4's page tables cannot point at single tokens.
    """

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
        page_size = self.page_size
        if self._pevlm_num_seqs is not None:
            self.page_size = 1
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


class PevlmFlashInfer(PevlmBackend):
    """``flashinfer``: an own paged prefill wrapper, planned on virtual sequences.

    SGLang serves multimodal models through the paged wrapper, planned with pages of one token,
    whatever the page size of the pool; so are virtual sequences.
    """

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
        # FlashInfer plans on the host: of lists on the device it would make copies, and wait.
        cu_seqlens_q, cu_seqlens_k, last_page_len = (
            pinned(torch.tensor(list(numbers), dtype=torch.int32), plan.kv_indices.device)
            for numbers in (
                accumulate(plan.seqlens_q, initial=0),
                accumulate(plan.seqlens_k, initial=0),
                [1] * plan.num_seqs,
            )
        )
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


class PevlmTrtllmMha(PevlmBackend):
    """``trtllm_mha``: SGLang's default on data-centre Blackwell.

    Its page tables hold whole pages of 16 tokens and more, so its own prefill cannot run virtual
    sequences. Its pool is read by other kernels like any other: a row a token.
    """

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


class PevlmTriton(PevlmBackend):
    """``triton``: rewritten metadata for SGLang's own extend kernel.

    The kernel takes, a sequence, a list of cached slots and then the new keys and values
    themselves, causal. A virtual sequence is exactly that: its key ranges but for its own tokens,
    and its own tokens. Keys that this forward computes are in the cache by then: ``forward_extend``
    stores first.
    """

    pevlm_base = "triton"

    def pevlm_rewrite(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        metadata = self.forward_metadata
        lengths = [s.piece.num_queries for s in sequences]
        keys = [(s.row, s.piece.keys_before_start()) for s in sequences]
        lists = slot_lists(lengths, keys, self.req_to_token, forward_batch.req_pool_indices)
        for name, numbers in zip(("qo_indptr", "kv_indptr", "kv_indices"), lists, strict=True):
            setattr(metadata, name, numbers.to(getattr(metadata, name).dtype))
        metadata.max_extend_len = max(lengths)


class PevlmTorchNative(PevlmBackend):
    """``torch_native``: for machines without a GPU. Its own prefill recomputes the cached prefix's
    queries."""

    pevlm_base = "torch_native"
    pevlm_without_base = "expected another base backend: torch_native takes no metadata to rewrite"
    pevlm_stores_scaled = False

    def pevlm_check(self) -> None:
        if torch.device(self.device).type != "cpu":
            raise UnsupportedError(
                f"torch_native on {self.device}: PEVLM's kernel for it runs on the CPU; choose "
                "--pevlm-base-backend fa3, flashinfer or triton"
            )


MIXINS: dict[str, type[PevlmBackend]] = {
    "FlashAttentionBackend": PevlmFlashAttention,
    "FlashInferAttnBackend": PevlmFlashInfer,
    "TRTLLMHAAttnBackend": PevlmTrtllmMha,
    "TorchNativeAttnBackend": PevlmTorchNative,
    "TritonAttnBackend": PevlmTriton,
}
"""SGLang's class → ours; by name, since to import all of SGLang's backends would load every kernel
library."""


def attach(
    backend: Any,
    observer: Observer,
    *,
    layers: Sequence[Any],
    dtype: torch.dtype,
    kernel: str = "auto",
) -> str:
    """Turn a constructed backend of SGLang into its PEVLM form, in place.

    Its class changes after construction, so that what the base's constructor decides by its own
    class stays as it was.

    Args:
        layers, dtype, kernel: see :func:`pevlm_sglang.attention.kernel_choice.choose`.

    Returns:
        What ``auto`` passed over on the way to ``backend.pevlm_kernel``, in words; or nothing.

    Raises:
        UnsupportedError: no mixin for this backend, a mode of it that PEVLM cannot build on, or a
            kernel that cannot serve on it.
    """
    base = type(backend)
    if base.__name__ not in MIXINS:
        raise UnsupportedError(
            f"SGLang's attention backend {base.__name__}: PEVLM cannot build on it; "
            "choose one with --pevlm-base-backend fa3|fa4|flashinfer|trtllm_mha|triton|torch_native"
        )
    backend.__class__ = type(f"Pevlm{base.__name__}", (MIXINS[base.__name__], base), {})
    backend.pevlm_observer = observer
    backend.pevlm_check()
    backend.pevlm_forget()
    backend.pevlm_kernel, passed_over = choose(backend, layers, dtype, kernel)
    if backend.pevlm_kernel != BASE:
        backend.pevlm_prefill = bound(backend.pevlm_kernel)
    return passed_over
