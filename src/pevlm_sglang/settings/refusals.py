"""What PEVLM cannot serve, checked before the server starts."""

from __future__ import annotations

from typing import Any, NamedTuple

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.settings.config import PevlmConfig, flag


class Refusal(NamedTuple):
    """A server argument of SGLang that PEVLM does not work with, and why."""

    option: str
    unless: tuple[Any, ...]
    reason: str

    @property
    def flag(self) -> str:
        return flag(self.option)


_PARALLEL = "the rows or keys of a prefill are split over ranks, across virtual sequences"
_ENCODER = "plugins are not loaded in the encoder server, which has the vision tower"
_LAUNCHER = "its launcher does not check that schedulers report PEVLM active"
_MODELS = "its models and processors are others than those that PEVLM was made for"
_WORKERS = "plugins are not loaded in its worker processes, where videos are sampled and resized"
_CACHE = "its keys and values are not read token by token"
_MEMORY = "cache slots are not token-granular there"

# Options that a release lacks are passed over: there is nothing to refuse.
REFUSALS = (
    Refusal("attn_cp_size", (1,), _PARALLEL),
    Refusal("dcp_size", (1,), _PARALLEL),
    Refusal("enable_prefill_cp", (False,), _PARALLEL),
    Refusal("enable_two_batch_overlap", (False,), "it splits a batch without its frames"),
    Refusal("enable_pdmux", (False,), "it keeps backends of its own, a stream each"),
    Refusal("dllm_algorithm", (None,), "a diffusion model does not prefill causally"),
    Refusal("enable_unified_memory", (False,), _MEMORY),
    Refusal("enable_page_major_kv_layout", (False,), _MEMORY),
    Refusal("enable_hisparse", (False,), "it attends to a subset of its own"),
    Refusal("speculative_adaptive", (False,), "it swaps in backends of its own at run time"),
    Refusal("use_ray", (False,), "plugins are not loaded in Ray actors"),
    Refusal("encoder_only", (False,), _ENCODER),
    Refusal("language_only", (False,), _ENCODER),
    Refusal("disaggregation_mode", ("null",), "KV would cross servers with other settings"),
    Refusal("enable_flexkv", (False,), "its store knows no cache namespace"),
    Refusal("radix_cache_backend", (None,), "a cache of its own may know no cache namespace"),
    Refusal("enable_mis", (False,), "multi-item scoring has a mask of its own"),
    Refusal("model_impl", ("auto", "sglang"), _MODELS),
    Refusal("tokenizer_worker_num", (1,), _WORKERS),
    Refusal("smg_grpc_mode", (False,), _LAUNCHER),
    Refusal("grpc_mode", (False,), _LAUNCHER),
    Refusal(
        "kv_cache_dtype",
        ("auto", "bfloat16", "bf16", "float16", "fp8_e4m3", "fp8_e5m2"),
        _CACHE,
    ),
)


class Switch(NamedTuple):
    """An environment variable of SGLang's that makes another server, and why PEVLM does not work
    with it."""

    name: str
    unless: tuple[Any, ...]
    reason: str


# Those that a release lacks are passed over. Source: sglang/srt/environ.py.
SWITCHES = (
    Switch("SGLANG_RUST_SERVER", (False,), "its server prepares media in processes of its own"),
    Switch("SGLANG_USE_HND_KVCACHE", (False,), _CACHE),
    Switch(
        "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR",
        (None,),
        "PEVLM leaves out what its mask leaves out, and no small scores",
    ),
)


def check_environment() -> None:
    """Refuse environment variables that PEVLM does not work with.

    Raises:
        UnsupportedError: names the variable, what was expected, what came, and why.
    """
    from sglang.srt.environ import envs

    for switch in SWITCHES:
        value = getattr(envs, switch.name).get() if hasattr(envs, switch.name) else None
        if value is not None and value not in switch.unless:
            raise UnsupportedError(
                f"{switch.name}: expected {' or '.join(map(str, switch.unless))}, got {value}; "
                f"{switch.reason}. Unset {switch.name}, or serve without --attention-backend pevlm"
            )


DETERMINISTIC_BASES = ("fa3", "flashinfer")
"""Bases with a prefill kernel of their own that PEVLM runs under deterministic inference. The
triton backend takes another kernel there, which PEVLM does not rewrite."""


def check_server_args(resolved: Any, config: PevlmConfig) -> None:
    """Refuse settings of SGLang's resolved server arguments that PEVLM does not work with.

    Raises:
        UnsupportedError: names the option, what was expected, what came, and why.
    """
    for refusal in REFUSALS:
        value = getattr(resolved, refusal.option, refusal.unless[0])
        if value not in refusal.unless:
            raise UnsupportedError(
                f"{refusal.flag}: expected {' or '.join(map(str, refusal.unless))}, got {value}; "
                f"{refusal.reason}. Leave {refusal.flag} out, or serve without --attention-backend "
                "pevlm"
            )
    if not getattr(resolved, "enable_deterministic_inference", False):
        return
    base = resolved.prefill_attention_backend or resolved.attention_backend
    if base not in DETERMINISTIC_BASES:
        raise UnsupportedError(
            "--enable-deterministic-inference: expected --pevlm-base-backend "
            f"{' or '.join(DETERMINISTIC_BASES)}, whose own prefill kernel PEVLM runs there, got "
            f"{base or 'none'}"
        )
    if config.prefill_kernel not in ("auto", "base"):
        raise UnsupportedError(
            "--pevlm-prefill-kernel: expected base with --enable-deterministic-inference, whose "
            f"results do not depend on the batch, got {config.prefill_kernel}"
        )


def check_model(model_runner: Any) -> None:
    """Refuse, by an UnsupportedError that says why, models whose attention is not plain causal
    attention over a token-granular cache."""
    from sglang.srt.configs.model_config import AttentionArch

    config, window = model_runner.model_config, model_runner.sliding_window_size
    findings = {
        "multi-head latent attention (MLA)": config.attention_arch != AttentionArch.MHA,
        "an encoder-decoder with cross-attention": config.is_encoder_decoder,
        "sliding-window attention": window is not None and window > 0,
        "interleaved rope (use_irope)": getattr(config.hf_text_config, "use_irope", False),
        "no generation (an embedding model)": not config.is_generation,
    }
    if found := next((finding for finding, present in findings.items() if present), None):
        raise UnsupportedError(
            f"model {config.model_path}: has {found}, which PEVLM does not cover; "
            "serve it without --attention-backend pevlm"
        )
