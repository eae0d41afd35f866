"""kernel_choice.py: which kernel a server takes, and what it is refused for before it serves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from pevlm_kernels import IMPLEMENTATIONS, flash
from pevlm_sglang.attention import kernel_choice
from pevlm_sglang.attention.bases import (
    PevlmFlashAttention,
    PevlmFlashInfer,
    PevlmTorchNative,
    PevlmTriton,
    PevlmTrtllmMha,
    attach,
)
from pevlm_sglang.attention.kernel_choice import ORDERS, choose, preference, requested_kernel
from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.observe.observer import Observer
from pevlm_sglang.settings.config import BASE_BACKENDS, PREFILL_KERNELS, PevlmConfig
from support.kernel_calls import random_plan
from support.lookups import recorded_lookups


class Pool:
    def __init__(self, shape: tuple[int, ...] = (8, 2, 16), dtype: torch.dtype = torch.float32):
        self.buffer = torch.full(shape, torch.nan).to(dtype)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.buffer

    get_value_buffer = get_key_buffer


def layer(**changes: Any) -> SimpleNamespace:
    ordinary = {
        "layer_id": 0,
        "tp_q_head_num": 4,
        "tp_k_head_num": 2,
        "tp_v_head_num": 2,
        "qk_head_dim": 16,
        "v_head_dim": 16,
        "scaling": 0.25,
        "logit_cap": 0.0,
        "k_scale": None,
        "k_scale_float": None,
    }
    return SimpleNamespace(**(ordinary | changes))


def backend(pool: Pool | None = None, **changes: Any) -> Any:
    """What :func:`choose` reads of a backend with its mixin on."""
    ordinary = {
        "token_to_kv_pool": pool or Pool(),
        "pevlm_without_base": "expected another base",
        "pevlm_stores_scaled": True,
        "pevlm_base": "torch_native",
    }
    return SimpleNamespace(**(ordinary | changes))


def chosen(requested: str, of: Any = None, layers: list | None = None) -> tuple[str, str]:
    return choose(of or backend(), layers or [layer(), layer()], torch.float32, requested)


def test_every_name_is_an_implementation() -> None:
    assert set(PREFILL_KERNELS) - {"auto", "base"} <= set(IMPLEMENTATIONS)


def test_the_table_is_of_these_names_and_has_a_last_row_for_each_base() -> None:
    assert {kernel for row in ORDERS for kernel in row.kernels} <= set(PREFILL_KERNELS) - {"auto"}
    last = {row.base: row for row in ORDERS}
    assert set(last) == set(BASE_BACKENDS) - {"auto"}
    assert all((row.generations, row.narrow) == (None, None) for row in last.values())


def test_auto_takes_the_first_that_can_and_says_what_it_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_choice, "preference", lambda *given: ("flash", "sdpa"))
    kernel, passed_over = chosen("auto")
    assert kernel == "sdpa"
    assert passed_over.startswith("flash: expected tensors on a CUDA GPU, got cpu")
    assert chosen("sdpa") == ("sdpa", "")
    assert chosen("base", backend(pevlm_without_base="")) == ("base", "")


def test_a_narrow_cache_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        kernel_choice, "preference", lambda *given: asked.append(given) or preference(*given)
    )
    scaled = layer(k_scale=torch.tensor(0.5), k_scale_float=0.5)
    of = backend(Pool(dtype=torch.float8_e5m2))
    assert chosen("auto", of, [scaled]) == ("sdpa", "")
    assert asked == [("torch_native", None, True)]


@pytest.mark.parametrize(
    ("requested", "of", "layers", "message"),
    [
        ("flash", {}, [layer()], r"^--pevlm-prefill-kernel flash: .*on a CUDA GPU, got cpu.*auto"),
        ("base", {}, [layer()], r"kernel base: .*expected another base\. Choose another, or auto"),
        ("sdpa", {}, [layer(logit_cap=30.0)], "scores without a cap, got logit_cap 30.0"),
        ("sdpa", {}, [layer(k_scale=torch.tensor(0.5))], r"expected scales .*\(k_scale_float\)"),
        ("sdpa", {"pool": Pool((2, 2, 4, 16))}, [layer()], r"expected a row a token, .*\(2, 2, 4"),
        (
            "auto",
            {"pevlm_base": "flashinfer"},
            [layer()],
            r"^--pevlm-prefill-kernel auto: .*base: .*Choose another base backend",
        ),
    ],
)
def test_refused_before_it_serves(requested: str, of: dict, layers: list, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        chosen(requested, backend(**of), layers)


@pytest.mark.parametrize("kind", ["wrong", "failing"])
def test_a_kernel_that_does_not_work_here(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def prefill(q: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if kind == "failing":
            raise RuntimeError("no kernel image is available")
        return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])

    monkeypatch.setattr(kernel_choice, "bound", lambda kernel: prefill)
    expected = {"failing": "got RuntimeError: no kernel image", "wrong": r"got \[0.0, 0.0, 0.0\]"}
    with pytest.raises(UnsupportedError, match=f"kernel sdpa: .*{expected[kind]}.*Choose another"):
        chosen("sdpa")


def mixin(of: type, **attributes: Any) -> Any:
    """A backend with nothing but its mixin."""
    made = object.__new__(of)
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize(
    ("base", "capability", "narrow", "expected"),
    [
        ("fa3", (9, 0), False, ("flash", "base")),
        ("fa3", (9, 0), True, ("base",)),
        ("fa3", (8, 0), False, ("base",)),
        ("fa4", (10, 0), False, ("flash", "triton")),
        ("flashinfer", (9, 0), False, ("base",)),
        ("flashinfer", (10, 0), True, ("flash", "base")),
        ("flashinfer", (12, 0), False, ("base",)),
        ("trtllm_mha", (10, 3), False, ("flash", "triton")),
        ("triton", (8, 6), False, ("triton", "base")),
        ("torch_native", None, False, ("sdpa",)),
    ],
)
def test_preference(base: str, capability: Any, narrow: bool, expected: tuple[str, ...]) -> None:
    assert preference(base, capability, narrow) == expected


@pytest.mark.parametrize(
    ("of", "base"),
    [
        (PevlmFlashAttention, "fa3"),
        (PevlmFlashInfer, "flashinfer"),
        (PevlmTrtllmMha, "trtllm_mha"),
        (PevlmTriton, "triton"),
        (PevlmTorchNative, "torch_native"),
    ],
)
def test_each_mixin_has_its_rows(of: type, base: str) -> None:
    assert of.pevlm_base == base


def test_kernel_is_as_asked_for() -> None:
    plain, deterministic = (
        SimpleNamespace(enable_deterministic_inference=value) for value in (False, True)
    )
    assert requested_kernel(plain, PevlmConfig()) == "auto"
    assert requested_kernel(plain, PevlmConfig(prefill_kernel="flash")) == "flash"
    assert requested_kernel(deterministic, PevlmConfig()) == "base"


def test_fa4_says_why_it_has_no_base_kernel() -> None:
    of = mixin(PevlmFlashAttention, fa_impl_ver=4, _kv_shard_pool=None, token_to_kv_pool=Pool())
    of.pevlm_check()
    assert of.pevlm_base == "fa4"
    with pytest.raises(UnsupportedError, match=r"expected FlashAttention-3, .*FlashAttention-4"):
        choose(of, [], torch.float32, "base")


def test_fp4_trtllm_is_refused() -> None:
    of = mixin(PevlmTrtllmMha, prefill_uses_native_fp4=True, prefill_uses_dequant_workspace=False)
    with pytest.raises(UnsupportedError, match="trtllm_mha with an FP4 cache"):
        of.pevlm_check()


def test_an_option_that_changes_the_scores_stops_the_server() -> None:
    of = mixin(PevlmTorchNative, _pevlm_plan=object(), pevlm_kernel="sdpa")
    with pytest.raises(NotImplementedError, match=r"sdpa: the model calls .* with sinks, expected"):
        of.forward_extend(None, None, None, layer(), None, sinks=torch.zeros(4), return_lse=False)


def test_a_layer_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be found is found when the kernel is chosen, with no layer run yet."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    monkeypatch.setattr(flash, "refusal", lambda *tensors: None)
    pool = Pool()
    pool.buffer.zero_()
    of = type("TorchNativeAttnBackend", (AttentionBackend,), {})()
    of.device, of.token_to_kv_pool = "cpu", pool
    q = torch.zeros(5, 4 * 16)
    with recorded_lookups() as lookups:
        attach(
            of,
            Observer(log=False, metrics=False),
            layers=[layer()],
            dtype=torch.float32,
            kernel="flash",
        )
        assert any(lookup.startswith("find_spec ") for lookup in lookups)
        of._pevlm_plan, _ = random_plan([(2, 4), (3, 3)], num_slots=8)
        lookups.clear()
        out = of.forward_extend(q, None, None, layer(), None, save_kv_cache=False)
        assert not lookups
    assert out.shape == q.shape
