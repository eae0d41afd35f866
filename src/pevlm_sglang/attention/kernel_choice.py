"""Which kernel runs the virtual sequences of a server: decided once, on the constructed backend.

A kernel that cannot take the server's tensors is refused before the server is ready, and the one
that is taken has run once by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pevlm_kernels import PrefillPlan, pevlm_prefill
from pevlm_kernels.choice import refusal
from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.errors import UnsupportedError

BASE = "base"
"""The name of the base backend's own kernel, on rewritten metadata."""


class Probe(NamedTuple):
    """Small tensors of a layer's heads, widths, dtypes and device, in the pool's layout."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    scaling: float


def choose(
    backend: PevlmBackend, layers: Sequence[Any], dtype: torch.dtype, requested: str
) -> tuple[str, str]:
    """The prefill kernel of a server.

    Args:
        backend: constructed, with its mixin on.
        layers: the attention layers of this rank, SGLang's ``RadixAttention``.
        dtype: that the model computes in.
        requested: ``--pevlm-prefill-kernel``.

    Returns:
        ``base`` or an implementation of ``pevlm_kernels``; and in words, what ``auto`` passed over.

    Raises:
        UnsupportedError: the kernel asked for, or every one that ``auto`` would take, cannot take
            the server's tensors; says why and what to do.
    """
    probes = _probes(backend, layers, dtype)
    order: tuple[str, ...] = (requested,)
    if requested == "auto":
        narrow = any(probe.k_cache.dtype != probe.q.dtype for probe in probes)
        device = probes[0].q.device if probes else torch.device("cpu")
        on_gpu = device.type == "cuda"
        capability = torch.cuda.get_device_capability(device) if on_gpu else None
        order = backend.pevlm_preference(capability, narrow)
    passed_over: list[str] = []
    for kernel in order:
        reason = _refusal(backend, layers, probes, kernel)
        if reason is None:
            for probe in probes if kernel != BASE else ():
                _run_once(kernel, probe)
            return kernel, "; ".join(passed_over)
        passed_over.append(f"{kernel}: {reason}")
    remedy = "choose another, or auto" if requested != "auto" else "choose another base backend"
    raise UnsupportedError(
        f"--pevlm-prefill-kernel {requested}: expected a kernel that takes this server's tensors, "
        f"got {'; '.join(passed_over)}. {remedy.capitalize()}, or serve without "
        "--attention-backend pevlm"
    )


def _probes(backend: PevlmBackend, layers: Sequence[Any], dtype: torch.dtype) -> list[Probe]:
    """One for each kind of layer.

    Raises:
        UnsupportedError: a pool that does not hold a row of heads a token.
    """
    pool = backend.token_to_kv_pool
    found: dict[Any, Probe] = {}
    for layer in layers:
        k, v = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        row_k = (layer.tp_k_head_num, layer.qk_head_dim)
        row_v = (layer.tp_v_head_num, layer.v_head_dim)
        if (tuple(k.shape[1:]), tuple(v.shape[1:])) != (row_k, row_v):
            raise UnsupportedError(
                f"the KV cache of {type(pool).__name__}: expected a row a token, [slots, "
                f"{row_k[0]}, {row_k[1]}], got {tuple(k.shape)} and {tuple(v.shape)}; serve "
                "without SGLANG_USE_HND_KVCACHE or another layout of the cache"
            )
        q = torch.zeros(3, layer.tp_q_head_num, layer.qk_head_dim, dtype=dtype, device=k.device)
        key = (q.shape, row_k, row_v, k.dtype, v.dtype)
        found.setdefault(key, Probe(q, _rows(k, 0), _rows(v, 1), layer.scaling))
    return list(found.values())


def _rows(buffer: torch.Tensor, value: int) -> torch.Tensor:
    """Two slots of a layer's cache, not its own: those may not be backed by memory yet."""
    return torch.full((2, *buffer.shape[1:]), value, device=buffer.device).to(buffer.dtype)


def _refusal(
    backend: PevlmBackend, layers: Sequence[Any], probes: Sequence[Probe], kernel: str
) -> str | None:
    """Why this kernel cannot serve here; None if it can."""
    if kernel == BASE:
        return backend.pevlm_without_base or None
    for layer in layers:
        if layer.logit_cap:
            return f"expected scores without a cap, got logit_cap {layer.logit_cap}"
        if backend.pevlm_stores_scaled and layer.k_scale is not None and not layer.k_scale_float:
            return "expected scales of the KV cache as numbers too (k_scale_float), got none"
    reasons = (refusal(kernel, probe.q, probe.k_cache, probe.v_cache) for probe in probes)
    return next((reason for reason in reasons if reason is not None), None)


def _run_once(kernel: str, probe: Probe) -> None:
    """Three queries, alone and two in a row, whose attention is known: equal weights on values 1.

    Raises:
        UnsupportedError: the kernel fails on this machine, or computes something else.
    """
    device = probe.q.device
    plan = PrefillPlan(
        cu_seqlens_q=torch.tensor([0, 1, 3], dtype=torch.int32, device=device),
        cu_seqlens_k=torch.tensor([0, 1, 3], dtype=torch.int32, device=device),
        kv_indices=torch.tensor([1, 0, 1], device=device),
        seqlens_q=(1, 2),
        seqlens_k=(1, 2),
    )
    try:
        out, lse = pevlm_prefill(
            probe.q,
            probe.k_cache,
            probe.v_cache,
            plan,
            softmax_scale=probe.scaling,
            impl=kernel,
            return_lse=True,
        )
        expected = torch.tensor([0.0, 0.0, math.log(2)], device=device)
        right = bool((out == 1).all()) and bool(((lse - expected).abs() < 1e-2).all())
    except (RuntimeError, ValueError, TypeError, ImportError, AssertionError) as error:
        raise UnsupportedError(
            f"--pevlm-prefill-kernel {kernel}: expected to run on this machine, got "
            f"{type(error).__name__}: {error}. Choose another with --pevlm-prefill-kernel"
        ) from error
    if not right:
        raise UnsupportedError(
            f"--pevlm-prefill-kernel {kernel}: expected attention of 1 to three equal keys, got "
            f"{out.flatten()[:3].tolist()}. Choose another with --pevlm-prefill-kernel"
        )
