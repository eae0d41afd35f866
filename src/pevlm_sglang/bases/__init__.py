"""One mixin a base backend of SGLang: how its prefill is told to run virtual sequences."""

from __future__ import annotations

from typing import Any

from pevlm_sglang.backend import PevlmBackend
from pevlm_sglang.observe import Observer
from pevlm_sglang.support import UnsupportedError


def put_on(backend: Any, observer: Observer) -> None:
    """Turn a constructed backend of SGLang into its PEVLM form, in place.

    Its class changes after construction, so that what the base's constructor decides by its own
    class stays as it was.

    Raises:
        UnsupportedError: no mixin for this backend.
    """
    mixin = _mixin(type(backend).__name__)
    backend.__class__ = type(f"Pevlm{type(backend).__name__}", (mixin, type(backend)), {})
    backend.pevlm_observer = observer
    backend.pevlm_forget()


def _mixin(backend_name: str) -> type[PevlmBackend]:
    # By name: importing every backend of SGLang would load every kernel library.
    if backend_name == "TorchNativeAttnBackend":
        from pevlm_sglang.bases.torch_native import PevlmTorchNative

        return PevlmTorchNative
    if backend_name == "TritonAttnBackend":
        from pevlm_sglang.bases.triton import PevlmTriton

        return PevlmTriton
    raise UnsupportedError(
        f"SGLang's attention backend {backend_name}: PEVLM cannot build on it; "
        "choose one with --pevlm-base-backend fa3|flashinfer|triton|torch_native"
    )
