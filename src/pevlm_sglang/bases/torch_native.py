"""``torch_native``: an own ``forward_extend`` over ``pevlm_kernels``, for machines without a GPU.

Source: sglang/srt/layers/attention/torch_native_backend.py, whose own prefill recomputes the cached
prefix's queries and takes no metadata to rewrite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from pevlm_kernels import PrefillPlan, pevlm_prefill
from pevlm_sglang.backend import PevlmBackend
from pevlm_sglang.plan import VirtualSequence
from pevlm_sglang.support import UnsupportedError


class PevlmTorchNative(PevlmBackend):
    """Mixin for ``TorchNativeAttnBackend``."""

    _pevlm_plan: PrefillPlan | None

    def pevlm_check(self) -> None:
        if torch.device(self.device).type != "cpu":
            raise UnsupportedError(
                f"torch_native on {self.device}: PEVLM's kernel for it runs on the CPU; choose "
                "--pevlm-base-backend fa3, flashinfer or triton"
            )

    def pevlm_forget(self) -> None:
        self._pevlm_plan = None

    def pevlm_plan(self, sequences: Sequence[VirtualSequence], forward_batch: Any) -> None:
        self._pevlm_plan = self.pevlm_build(sequences, forward_batch)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """``[total_q, num_q_heads * head_dim]``, as the base's."""
        if self._pevlm_plan is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        out = pevlm_prefill(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            self._pevlm_plan,
            softmax_scale=layer.scaling,
        )
        return out.view(q.shape[0], -1)
