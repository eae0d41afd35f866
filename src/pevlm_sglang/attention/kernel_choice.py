"""Which kernel runs the virtual sequences of a server: decided once, on the constructed backend, by
one table.

A kernel that cannot take the server's tensors is refused before the server is ready, and the one
that is taken has run once by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pevlm_kernels import bound, packed_plan
from pevlm_kernels.choice import ON_GPU, refusal
from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.settings.config import PevlmConfig

BASE = "base"
"""The name of the base backend's own kernel, on rewritten metadata."""


class Order(NamedTuple):
    """What ``--pevlm-prefill-kernel auto`` tries on a base backend, in this order.

    Attributes:
        base: see :attr:`PevlmBackend.pevlm_base`.
        generations: major compute capabilities of the GPU; None for any, and for none.
        narrow: whether the cache holds another dtype than the model computes in (fp8); None for
            either.
    """

    base: str
    generations: tuple[int, ...] | None
    narrow: bool | None
    kernels: tuple[str, ...]


# The first row that fits. All of it is a prediction; nothing was measured on a GPU.
ORDERS = (
    # Through pages of one token, FlashAttention-3 loads keys row by row (cp.async), in a row tile
    # by tile (TMA), which exists from Hopper on. To lay those of sparse sequences in a row costs
    # little: at 100k tokens with a sink and blocks of 4k, Qwen2.5-VL-7B's have 190k keys of 2 KiB,
    # read and written once more: 0.8 GB a layer, 0.3 ms at 3 TB/s. The attention itself is 9e12
    # operations, 15 ms at 600 TFLOP/s. Products in fp8 are twice as fast as in q's dtype, and those
    # only the base computes.
    Order("fa3", (9,), False, ("flash", BASE)),
    Order("fa3", None, None, (BASE,)),
    Order("fa4", None, None, ON_GPU),
    # FlashInfer plans the same virtual sequences itself, so nothing is gained but on data-centre
    # Blackwell: its paged kernel for pages of one token is Ampere's there, and FlashAttention-4 is
    # written for that GPU's tensor cores.
    Order("flashinfer", (10, 11), None, ("flash", BASE)),
    Order("flashinfer", None, None, (BASE,)),
    Order("trtllm_mha", None, None, ON_GPU),
    # SGLang's kernel walks cached and new keys in two loops, with tiles that fit every GPU; PEVLM's
    # walks them in one, starts the longest programs first and has tiles for each generation.
    Order("triton", None, None, ("triton", BASE)),
    # PyTorch's own operators; Triton's interpreter is for tests.
    Order("torch_native", None, None, ("sdpa",)),
)


def preference(base: str, capability: tuple[int, int] | None, narrow: bool) -> tuple[str, ...]:
    """The kernels of the first row that fits; ``capability`` is the GPU's, None without one."""
    major = capability[0] if capability else None
    return next(
        row.kernels
        for row in ORDERS
        if row.base == base
        and (row.generations is None or major in row.generations)
        and row.narrow in (None, narrow)
    )


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
        order = preference(backend.pevlm_base, capability, narrow)
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
    """One for each kind of layer; a pool that does not hold a row of heads a token is refused."""
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
        q = torch.zeros(4, layer.tp_q_head_num, layer.qk_head_dim, dtype=dtype, device=k.device)
        key = (q.shape, row_k, row_v, k.dtype, v.dtype)
        # Slots not of the layer's own cache: those may not be backed by memory yet.
        zeros, ones = (
            torch.full((4, *buffer.shape[1:]), value, device=buffer.device).to(buffer.dtype)
            for buffer, value in ((k, 0), (v, 1))
        )
        found.setdefault(key, Probe(q, zeros, ones, layer.scaling))
    return list(found.values())


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
    reasons = (refusal(kernel, *probe[:3]) for probe in probes)
    return next((reason for reason in reasons if reason is not None), None)


def _run_once(kernel: str, probe: Probe) -> None:
    """Refuse a kernel that fails on this machine, or computes something else than equal weights on
    values 1 for four tokens, one of them in a sparse block and one that sees all."""
    plan = packed_plan(4, 1, ((1, 2), (2, 3)), probe.q.device)
    try:
        out, lse = bound(kernel)(*probe[:3], plan, softmax_scale=probe.scaling)
        expected = torch.tensor([1, 2, 2, 4], device=lse.device).log()
        right = bool((out == 1).all()) and bool(((lse - expected).abs() < 1e-2).all())
    except (RuntimeError, ValueError, TypeError, ImportError, AssertionError) as error:
        raise UnsupportedError(
            f"--pevlm-prefill-kernel {kernel}: expected to run on this machine, got "
            f"{type(error).__name__}: {error}. Choose another with --pevlm-prefill-kernel"
        ) from error
    if not right:
        raise UnsupportedError(
            f"--pevlm-prefill-kernel {kernel}: expected attention of 1 to equal keys, got "
            f"{out.flatten()[:3].tolist()}. Choose another with --pevlm-prefill-kernel"
        )


def attention_layers(model: Any) -> list[Any]:
    """SGLang's attention layers with a KV cache on this rank."""
    from sglang.srt.layers.radix_attention import RadixAttention

    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def requested_kernel(resolved: Any, config: PevlmConfig) -> str:
    """``--pevlm-prefill-kernel``; with deterministic inference in SGLang's resolved arguments it is
    the base's own kernel, whose results SGLang makes independent of the batch."""
    deterministic = getattr(resolved, "enable_deterministic_inference", False)
    return BASE if deterministic else config.prefill_kernel
