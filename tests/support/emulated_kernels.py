"""FlashAttention-3 and FlashInfer on the CPU: their interfaces, dense attention inside.

What they read is what the real kernels read: page tables, lengths, slot lists. So SGLang's own
backends run on them with PEVLM's metadata, on a machine without a GPU. They check arguments as the
kernels would (int32 tables, rows that fit the lengths) and say nothing about speed.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

from pevlm_kernels.reference import masked_attention


def _bottom_right_causal(n: int, m: int, causal: bool) -> torch.Tensor:
    rows = torch.arange(m - n, m)[:, None]
    return torch.arange(m) <= rows if causal else torch.ones(n, m, dtype=torch.bool)


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
    **_unused: Any,
) -> torch.Tensor:
    """FlashAttention-3's paged interface (sgl_kernel.flash_attn)."""
    for name, tensor in (
        ("page_table", page_table),
        ("cache_seqlens", cache_seqlens),
        ("cu_seqlens_q", cu_seqlens_q),
    ):
        assert tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}"
    num_seqs = len(cache_seqlens)
    assert page_table.shape[0] == len(cu_seqlens_q) - 1 == num_seqs
    for descale in (k_descale, v_descale):
        assert descale is None or descale.shape == (num_seqs, k_cache.shape[2])
    lengths_q = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q >= max(lengths_q), "tiles beyond max_seqlen_q are never computed"
    assert int(cu_seqlens_q[-1]) == len(q)
    page_size = k_cache.shape[1]
    out = torch.full_like(q, torch.nan)
    for i, (n, m) in enumerate(zip(lengths_q, cache_seqlens.tolist(), strict=True)):
        pages = page_table[i, : -(-m // page_size)].long()
        k = k_cache[pages].flatten(0, 1)[:m]
        v = v_cache[pages].flatten(0, 1)[:m]
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i]) + n)
        mask = _bottom_right_causal(n, m, causal)
        out[rows] = masked_attention(q[rows], k, v, mask, softmax_scale=softmax_scale)
    return out


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
        **_unused: Any,
    ) -> None:
        assert page_size == 1
        assert bool((last_page_len == 1).all())
        assert len(last_page_len) == len(qo_indptr) - 1 == len(kv_indptr) - 1
        for tensor in (qo_indptr, kv_indptr, kv_indices, last_page_len):
            assert tensor.dtype == torch.int32
        self.plan = (qo_indptr.tolist(), kv_indptr.tolist(), kv_indices.long())
        self.heads = (num_qo_heads, num_kv_heads, head_dim)

    def forward(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        causal: bool,
        sm_scale: float,
        **_unused: Any,
    ) -> torch.Tensor:
        k_cache, v_cache = kv_cache
        assert (q.shape[1], k_cache.shape[-2], q.shape[2]) == self.heads
        q_at, k_at, indices = self.plan
        assert q_at[-1] == len(q)
        out = torch.full_like(q, torch.nan)
        for i in range(len(q_at) - 1):
            rows, slots = slice(q_at[i], q_at[i + 1]), indices[k_at[i] : k_at[i + 1]]
            mask = _bottom_right_causal(q_at[i + 1] - q_at[i], len(slots), causal)
            out[rows] = masked_attention(
                q[rows], k_cache[slots], v_cache[slots], mask, softmax_scale=sm_scale
            )
        return out


def install_flash_attention() -> None:
    """Stand in for ``sgl_kernel``, which does not load without a GPU. Call before SGLang's backend
    is imported."""
    kernel, flash = types.ModuleType("sgl_kernel"), types.ModuleType("sgl_kernel.flash_attn")
    kernel.merge_state_v2 = None  # type: ignore[attr-defined]
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"):
        setattr(flash, name, None)
    sys.modules |= {"sgl_kernel": kernel, "sgl_kernel.flash_attn": flash}
    from sglang.srt.layers.attention import flashattention_backend as module
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.get_device_capability = lambda *args: (9, 0)
    # SGLang's factory looks at the GPU before it constructs the backend.
    ATTENTION_BACKENDS["fa3"] = module.FlashAttentionBackend


def install_flashinfer() -> None:
    """Stand in for what SGLang's backend imports of ``flashinfer`` where a GPU is present."""
    from sglang.srt.layers.attention import flashinfer_backend as module
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    module.BatchPrefillWithPagedKVCacheWrapper = PagedPrefillWrapper
    module.BatchPrefillWithRaggedKVCacheWrapper = PagedPrefillWrapper
    module.BatchDecodeWithPagedKVCacheWrapper = PagedPrefillWrapper
    ATTENTION_BACKENDS["flashinfer"] = module.FlashInferAttnBackend
