"""FlashAttention, FlashInfer and TensorRT-LLM on the CPU: their interfaces, dense attention inside.

What they read is what the real kernels read: page tables, lengths, slot lists. So SGLang's own
backends run on them with PEVLM's metadata, on a machine without a GPU. They check arguments as the
kernels would (int32 tables, rows that fit the lengths) and say nothing about speed.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

from pevlm_kernels.reference import masked_attention_lse


def _bottom_right_causal(n: int, m: int, causal: bool) -> torch.Tensor:
    rows = torch.arange(m - n, m)[:, None]
    return torch.arange(m) <= rows if causal else torch.ones(n, m, dtype=torch.bool)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    return_softmax_lse: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The arguments that FlashAttention-2, 3 and 4 share, and what each calls the log-sum-exp."""
    assert return_softmax_lse + return_lse + return_attn_probs == 1
    assert cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_k[-1]) == len(k) == len(v), "the sequences tile the keys"
    keys = torch.arange(len(k)).split(cu_seqlens_k.diff().tolist())
    assert max_seqlen_k == max(map(len, keys))
    return _flash(q, k, v, keys, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)


def flash_attn_4_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-4's, which pages too."""
    if page_table is None:
        assert cu_seqlens_k is not None
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
            return_lse=return_lse,
        )
    assert return_lse
    assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    assert seqused_k is not None
    assert max_seqlen_k == max(seqused_k.tolist())
    slots = _paged_slots(k, v, page_table, seqused_k, cu_seqlens_q)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    return _flash(q, k, v, slots, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    **_unused: Any,
) -> Any:
    """FlashAttention-3's paged interface (sgl_kernel.flash_attn): pages of any size."""
    for descale in (k_descale, v_descale):
        assert descale is None or descale.shape == (len(cache_seqlens), k_cache.shape[2])
    slots = _paged_slots(k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q)
    k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    out, lse = _flash(
        q,
        k,
        v,
        slots,
        cu_seqlens_q,
        max_seqlen_q,
        softmax_scale,
        causal,
        (k_descale, v_descale),
    )
    return (out, lse) if return_softmax_lse else out


def _paged_slots(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seqlens_k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
) -> list[torch.Tensor]:
    """The rows of each sequence's keys, as the pages say."""
    page_size = k_cache.shape[1]
    assert page_table.dtype == seqlens_k.dtype == torch.int32
    assert page_table.dim() == 2
    assert page_table.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert page_table.shape[0] == len(cu_seqlens_q) - 1 == len(seqlens_k)
    assert seqlens_k.is_contiguous()
    assert v_cache.shape[:3] == k_cache.shape[:3]
    assert int(seqlens_k.max()) <= page_table.shape[1] * page_size, "keys beyond the table"
    assert 0 <= int(page_table.min()) <= int(page_table.max()) < len(k_cache), "no such page"
    within = torch.arange(page_size)
    return [
        (row[: -(-m // page_size), None].long() * page_size + within).flatten()[:m]
        for row, m in zip(page_table, seqlens_k.tolist(), strict=True)
    ]


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    descales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Args:
    descales: of keys and values, ``[num_seqs, num_kv_heads]``; of narrow products alone.
    """
    assert q.dtype == k.dtype == v.dtype
    narrow = q.dtype.itemsize == 1
    assert narrow or descales == (None, None), "only fp8 has scales"
    assert cu_seqlens_q.dtype == torch.int32
    assert int(cu_seqlens_q[0]) == 0
    assert int(cu_seqlens_q[-1]) == len(q)
    lengths_q = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q >= max(lengths_q), "tiles beyond max_seqlen_q are never computed"
    if narrow:  # the kernel's result is bfloat16; here what the test computes in
        q = q.float()
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[1::-1], torch.nan)
    for i, (rows, own) in enumerate(zip(torch.arange(len(q)).split(lengths_q), keys, strict=True)):
        mask = _bottom_right_causal(len(rows), len(own), causal)
        keys_of, values_of = (
            stored[own] if descale is None else stored[own].float() * descale[i][:, None]
            for stored, descale in zip((k, v), descales, strict=True)
        )
        out[rows], lse[:, rows] = masked_attention_lse(
            q[rows], keys_of, values_of, mask, softmax_scale=softmax_scale
        )
    return out, lse


FLASH = {
    "sgl_kernel.flash_attn": types.SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    ),
    "flash_attn.cute": types.SimpleNamespace(flash_attn_varlen_func=flash_attn_4_varlen_func),
    "flash_attn.flash_attn_interface": types.SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func
    ),
}
"""The modules of ``pevlm_kernels.flash.LIBRARIES``. That of FlashAttention-2 has no pages; its own
would have to hold a multiple of 256 tokens."""


class PagedPrefillWrapper:
    """``flashinfer.BatchPrefillWithPagedKVCacheWrapper``, planned with pages of one token."""

    def __init__(self, workspace: torch.Tensor, layout: str, **_unused: Any) -> None:
        assert layout == "NHD"
        self.is_cuda_graph_enabled = False

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype | None = None,
        **_unused: Any,
    ) -> None:
        assert page_size == 1
        assert bool((last_page_len == 1).all())
        assert len(last_page_len) == len(qo_indptr) - 1 == len(kv_indptr) - 1
        for tensor in (qo_indptr, kv_indptr, kv_indices, last_page_len):
            assert tensor.dtype == torch.int32
        self.plan = (qo_indptr.tolist(), kv_indptr.tolist(), kv_indices.long())
        self.heads = (num_qo_heads, num_kv_heads, head_dim)
        # The kernel is compiled for these, and reads whatever comes as such.
        self.dtypes = (q_data_type, kv_data_type or q_data_type)

    def forward(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        causal: bool,
        sm_scale: float,
        k_scale: float | None = None,
        v_scale: float | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        k_cache, v_cache = kv_cache
        assert (q.dtype, k_cache.dtype) == self.dtypes, "planned for other types"
        assert v_cache.dtype == k_cache.dtype
        assert (q.shape[1], k_cache.shape[-2], q.shape[2]) == self.heads
        q_at, k_at, indices = self.plan
        assert q_at[-1] == len(q)
        out = torch.full_like(q, torch.nan)
        for i in range(len(q_at) - 1):
            rows, slots = slice(q_at[i], q_at[i + 1]), indices[k_at[i] : k_at[i + 1]]
            mask = _bottom_right_causal(q_at[i + 1] - q_at[i], len(slots), causal)
            out[rows], _ = masked_attention_lse(
                q[rows],
                k_cache[slots],
                v_cache[slots],
                mask,
                softmax_scale=sm_scale * (1 if k_scale is None else k_scale),
                v_scale=1 if v_scale is None else v_scale,
            )
        return out


def trtllm_batch_context_with_kv_cache(
    *,
    query: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    cum_seq_lens_q: torch.Tensor,
    bmm1_scale: float,
    bmm2_scale: float,
    causal: bool,
    **_unused: Any,
) -> torch.Tensor:
    """FlashInfer's, on pages of ``[heads, page, dim]``."""
    assert causal
    assert bmm2_scale == 1
    out = torch.full_like(query, torch.nan)
    lengths_q = cum_seq_lens_q.diff().tolist()
    for i, (n, m) in enumerate(zip(lengths_q, seq_lens.tolist(), strict=True)):
        page_size = kv_cache[0].shape[2]
        pages = block_tables[i, : -(-m // page_size)].long()
        k, v = (part[pages].transpose(1, 2).flatten(0, 1)[:m] for part in kv_cache)
        rows = slice(int(cum_seq_lens_q[i]), int(cum_seq_lens_q[i]) + n)
        mask = _bottom_right_causal(n, m, True)
        out[rows], _ = masked_attention_lse(query[rows], k, v, mask, softmax_scale=bmm1_scale)
    return out


def install_pevlm_flash(version: int) -> None:
    """Stand in for what ``pevlm_kernels`` imports of a release of FlashAttention."""
    from pevlm_kernels import flash

    (library,) = [library for library in flash.LIBRARIES if library.version == version]
    vars(flash)["refusal"] = lambda *tensors: None
    vars(flash)["library_on"] = lambda device: library
    vars(flash)["pages_on"] = lambda device: bool(library.paged)
    vars(flash)["_load"] = FLASH.__getitem__


def install_flash_attention() -> None:
    """Stand in for ``sgl_kernel`` and FlashAttention-3."""
    module = _flash_attention_backend()
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.get_device_capability = lambda *args: (9, 0)
    # SGLang's factory looks at the GPU before it constructs the backend.
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    ATTENTION_BACKENDS["fa3"] = module.FlashAttentionBackend


def _flash_attention_backend() -> Any:
    """SGLang's module, which imports ``sgl_kernel``, which does not load without a GPU."""
    kernel, flash = types.ModuleType("sgl_kernel"), types.ModuleType("sgl_kernel.flash_attn")
    kernel.merge_state_v2 = None  # type: ignore[attr-defined]
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"):
        setattr(flash, name, None)
    sys.modules |= {"sgl_kernel": kernel, "sgl_kernel.flash_attn": flash}
    from sglang.srt.layers.attention import flashattention_backend

    return flashattention_backend


def install_flashinfer() -> None:
    """Stand in for what SGLang's backend imports of ``flashinfer`` where a GPU is present."""
    from sglang.srt.layers.attention import flashinfer_backend as module
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    module.BatchPrefillWithPagedKVCacheWrapper = PagedPrefillWrapper
    module.BatchPrefillWithRaggedKVCacheWrapper = PagedPrefillWrapper
    module.BatchDecodeWithPagedKVCacheWrapper = PagedPrefillWrapper
    ATTENTION_BACKENDS["flashinfer"] = module.FlashInferAttnBackend


def install_flash_attention_4() -> None:
    """Stand in for SGLang's copy of FlashAttention-4."""
    module = _flash_attention_backend()
    from sglang.kernels.ops.attention import flash_attention_v4

    flash_attention_v4.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.get_device_capability = lambda *args: (10, 0)


def install_trtllm_mha() -> None:
    """Stand in for what SGLang's backend calls of ``flashinfer`` on Blackwell."""
    install_flashinfer()
    from sglang.srt.layers.attention import trtllm_mha_backend as module

    module.make_persistent_multi_ctas_kv_counter_buffer = lambda *args, **kwargs: None
    prefill = types.SimpleNamespace(
        trtllm_batch_context_with_kv_cache=trtllm_batch_context_with_kv_cache
    )
    module.flashinfer = types.SimpleNamespace(prefill=prefill)


BASES = {
    "fa3": install_flash_attention,
    "fa4": install_flash_attention_4,
    "flashinfer": install_flashinfer,
    "trtllm_mha": install_trtllm_mha,
}
"""Base backends that run on emulated kernels."""

FLASH_VERSIONS = {"fa3": 3, "fa4": 4, "flashinfer": 2, "trtllm_mha": 4}
"""The release under PEVLM's own kernel on them, so that each has a base."""


def install(base: str) -> None:
    """Stand in for all that a base backend needs, and PEVLM on it."""
    if base in BASES:
        BASES[base]()
        install_pevlm_flash(FLASH_VERSIONS[base])
