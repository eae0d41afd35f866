"""support.py and bases: what PEVLM cannot serve is refused by name, with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pevlm_sglang.settings.config import PevlmConfig
from pevlm_sglang.settings.refusals import (
    REFUSALS,
    SWITCHES,
    UnsupportedError,
    check_environment,
    check_model,
    check_server_args,
)

CONFIG = PevlmConfig()


def server_args(**changes: Any) -> SimpleNamespace:
    """Resolved arguments of an ordinary server."""
    ordinary = {refusal.option: refusal.unless[0] for refusal in REFUSALS}
    ordinary |= {
        "prefill_attention_backend": None,
        "attention_backend": "fa3",
        "enable_deterministic_inference": False,
    }
    return SimpleNamespace(**(ordinary | changes))


def test_ordinary_server_is_accepted() -> None:
    check_server_args(server_args(), CONFIG)


def test_option_that_a_release_lacks_is_passed_over() -> None:
    args = server_args()
    del args.use_ray
    check_server_args(args, CONFIG)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("attn_cp_size", 2),
        ("dcp_size", 2),
        ("enable_prefill_cp", True),
        ("enable_two_batch_overlap", True),
        ("enable_pdmux", True),
        ("dllm_algorithm", "LowConfidence"),
        ("enable_unified_memory", True),
        ("enable_page_major_kv_layout", True),
        ("enable_hisparse", True),
        ("speculative_adaptive", True),
        ("use_ray", True),
        ("encoder_only", True),
        ("language_only", True),
        ("disaggregation_mode", "prefill"),
        ("enable_flexkv", True),
        ("radix_cache_backend", "mine"),
        ("enable_mis", True),
        ("model_impl", "transformers"),
        ("tokenizer_worker_num", 4),
        ("smg_grpc_mode", True),
        ("grpc_mode", True),
        ("kv_cache_dtype", "fp4_e2m1"),
    ],
)
def test_refused_options(option: str, value: Any) -> None:
    flag = "--" + option.replace("_", "-")
    with pytest.raises(
        UnsupportedError, match=rf"^{flag}: expected .*, got {value}; .*Leave {flag}"
    ):
        check_server_args(server_args(**{option: value}), CONFIG)


def test_every_refusal_has_a_case() -> None:
    cases = test_refused_options.pytestmark[0].args[1]
    assert {option for option, _ in cases} == {refusal.option for refusal in REFUSALS}


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("SGLANG_RUST_SERVER", "1", "True"),
        ("SGLANG_USE_HND_KVCACHE", "true", "True"),
        ("SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR", "0.5", "0.5"),
    ],
)
def test_refused_environment(
    name: str, value: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sglang")
    check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(
        UnsupportedError, match=rf"^{name}: expected .*, got {shown}; .*Unset {name}, or serve"
    ):
        check_environment()


def test_every_switch_has_a_case_and_is_sglangs() -> None:
    from sglang.srt.environ import envs

    cases = test_refused_environment.pytestmark[0].args[1]
    assert [name for name, *_ in cases] == [switch.name for switch in SWITCHES]
    for switch in SWITCHES:
        assert getattr(envs, switch.name).get() in switch.unless


@pytest.mark.parametrize("base", ["triton", "fa4", "trtllm_mha", None])
def test_deterministic_inference_wants_a_base_kernel(base: str | None) -> None:
    args = server_args(attention_backend=base, enable_deterministic_inference=True)
    with pytest.raises(UnsupportedError, match=r"^--enable-deterministic-inference: .* fa3"):
        check_server_args(args, CONFIG)
    args.prefill_attention_backend = "fa3"
    check_server_args(args, CONFIG)
    check_server_args(args, PevlmConfig(prefill_kernel="base"))
    with pytest.raises(UnsupportedError, match=r"--pevlm-prefill-kernel: expected base .* flash$"):
        check_server_args(args, PevlmConfig(prefill_kernel="flash"))


def test_unknown_base_backend_is_refused() -> None:
    from pevlm_sglang.attention.bases import attach
    from pevlm_sglang.observe.observer import Observer

    with pytest.raises(UnsupportedError, match=r"attention backend SimpleNamespace: PEVLM cannot"):
        attach(
            SimpleNamespace(),
            Observer(log=False, metrics=False),
            layers=[],
            dtype=torch.float32,
        )


def test_torch_native_on_a_gpu_is_refused() -> None:
    """Its kernel runs on the CPU; the first long video would end the scheduler."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from pevlm_sglang.attention.bases import attach
    from pevlm_sglang.observe.observer import Observer

    backend = object.__new__(TorchNativeAttnBackend)
    backend.device = "cuda"
    with pytest.raises(UnsupportedError, match="torch_native on cuda: "):
        attach(backend, Observer(log=False, metrics=False), layers=[], dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_arch": "MLA"}, "multi-head latent attention"),
        ({"is_encoder_decoder": True}, "an encoder-decoder"),
        ({"window": 4096}, "sliding-window attention"),
        ({"hf_text_config": SimpleNamespace(use_irope=True)}, r"interleaved rope \(use_irope\)"),
        ({"is_generation": False}, "no generation"),
    ],
)
def test_models_without_plain_causal_attention(change: dict[str, Any], message: str) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    def runner(window: int | None = None, **changes: Any) -> SimpleNamespace:
        config = {
            "attention_arch": "MHA",
            "is_encoder_decoder": False,
            "hf_text_config": SimpleNamespace(use_irope=False),
            "is_generation": True,
            "model_path": "some/model",
            **changes,
        }
        config["attention_arch"] = AttentionArch[config["attention_arch"]]
        return SimpleNamespace(model_config=SimpleNamespace(**config), sliding_window_size=window)

    check_model(runner())
    check_model(runner(window=-1))
    with pytest.raises(UnsupportedError, match=f"model some/model: has {message}"):
        check_model(runner(**change))
