"""One mixin a base backend of SGLang: what it may build on, and how its own prefill is told to run
virtual sequences."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from pevlm_kernels import bound
from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.attention.kernel_choice import BASE, choose
from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.observe.observer import Observer


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
    mixin = _mixin(type(backend).__name__)
    backend.__class__ = type(f"Pevlm{type(backend).__name__}", (mixin, type(backend)), {})
    backend.pevlm_observer = observer
    backend.pevlm_check()
    backend.pevlm_forget()
    backend.pevlm_kernel, passed_over = choose(backend, layers, dtype, kernel)
    if backend.pevlm_kernel != BASE:
        backend.pevlm_prefill = bound(backend.pevlm_kernel)
    return passed_over


_MIXINS = {
    "FlashAttentionBackend": ("flash_attention", "PevlmFlashAttention"),
    "FlashInferAttnBackend": ("flashinfer", "PevlmFlashInfer"),
    "TRTLLMHAAttnBackend": ("trtllm_mha", "PevlmTrtllmMha"),
    "TorchNativeAttnBackend": ("torch_native", "PevlmTorchNative"),
    "TritonAttnBackend": ("triton", "PevlmTriton"),
}
"""SGLang's class → our module and mixin; by name, since to import all of SGLang's backends would
load every kernel library."""


def _mixin(backend_name: str) -> type[PevlmBackend]:
    if backend_name not in _MIXINS:
        raise UnsupportedError(
            f"SGLang's attention backend {backend_name}: PEVLM cannot build on it; "
            "choose one with --pevlm-base-backend fa3|fa4|flashinfer|trtllm_mha|triton|torch_native"
        )
    module, mixin = _MIXINS[backend_name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), mixin)
