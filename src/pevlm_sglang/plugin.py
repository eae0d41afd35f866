"""SGLang's door: the entry point ``sglang.srt.plugins`` and the hooks.

Every hook is a few lines; what they do lives in the modules that they call. SGLang's plugin loader
logs and swallows exceptions, which would leave a server with full attention under PEVLM's name. So
the seams are checked first, the backend's name is registered last, and the launcher believes a
scheduler only when it reports PEVLM active.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from pevlm_sglang import endpoints, requests, seams
from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.families import registry
from pevlm_sglang.families.family import Family
from pevlm_sglang.families.spans import SpanRule
from pevlm_sglang.layout import whole_steps
from pevlm_sglang.media import embeddings, limits, pixel_device, stages, transport, video_url
from pevlm_sglang.observe.observer import Observer
from pevlm_sglang.settings import flags, refusals, request_fields
from pevlm_sglang.settings.config import PevlmConfig

logger = logging.getLogger(__name__)

SERVER_INFO_KEY = "pevlm"

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info"
"""Since SGLang 0.5.23; before it, PEVLM does without data parallelism."""


class _Hook(NamedTuple):
    """A hook on a function of SGLang.

    Attributes:
        function: the hook; the first word of its name is its kind.
        parameters: of SGLang's function, that the hook relies on.
    """

    function: Callable[..., Any]
    parameters: tuple[str, ...]


_HOOKS: dict[str, _Hook] = {}
"""SGLang's function → the hook here."""


def _hook(target: str, *parameters: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a hook; where it meets what PEVLM cannot serve, the process ends."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def hook(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except UnsupportedError as error:
                _stop(error)

        _HOOKS[target] = _Hook(hook, parameters)
        return function

    return enter


@dataclass(frozen=True)
class _Serving:
    """PEVLM in a scheduler process, once its backend is in place.

    Attributes:
        corrections: what is corrected in SGLang's vision path, in words.
        prefill_kernel: what computes a forward with LOCAL tokens.
        forward_tokens: of a chunk; None where prompts are not chunked.
    """

    config: PevlmConfig
    rule: SpanRule
    observer: Observer
    holder: embeddings.EmbeddingHolder
    corrections: tuple[str, ...]
    prefill_kernel: str
    forward_tokens: int | None


class _Process:
    """What this process knows of a server with PEVLM: a launcher has no ``serving``."""

    config: PevlmConfig | None = None
    family: Family | None = None
    serving: _Serving | None = None


def register() -> None:
    """Entry point: hook SGLang, then offer the backend's name.

    Where a seam has moved the name is not offered, so that ``--attention-backend pevlm`` is refused
    by SGLang itself and every other server starts as before.
    """
    if seams.problem(_CONTROLLER, ()):
        _HOOKS.pop(_CONTROLLER, None)
    problems = [
        seams.problem(target, hook.parameters, exact=not seams.passes_on(hook.function))
        for target, hook in _HOOKS.items()
    ]
    if found := [problem for problem in problems if problem]:
        logger.error(
            "PEVLM is not available: this SGLang has %s; %s", "; ".join(found), seams.REMEDY
        )
        return
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices

    for target, hook in _HOOKS.items():
        kind = HookType[hook.function.__name__.split("_")[1].upper()]
        HookRegistry.register(target, hook.function, kind)
    Engine.server_args_class = _EngineServerArgs(Engine.server_args_class)
    unresolved = (
        "the backend's name reached SGLang's registry unresolved, so the plugin's hooks are not in "
        "place in this process; check the log above for 'Failed to apply hooks'"
    )
    register_attention_backend(flags.NAME)(lambda runner: _stop(unresolved))
    add_attention_backend_choices([flags.NAME])


def _stop(reason: object) -> NoReturn:
    """End this process with one line. SystemExit, because SGLang swallows every Exception."""
    message = f"PEVLM: {reason}"
    logger.error(message)
    sys.exit(message)


# --- Server arguments ------------------------------------------------------------------------


@_hook("sglang.srt.server_args.ServerArgs.add_cli_args", "parser")
def _after_add_cli_args(_result: None, parser: Any) -> None:
    flags.add_flags(parser)


@_hook("sglang.srt.server_args.ServerArgs.from_cli_args", "args")
def _after_from_cli_args(server_args: Any, _cls: type, namespace: Any) -> None:
    if given := flags.given_flags(dict(vars(namespace))):
        server_args._pevlm_flags = given


class _EngineServerArgs:
    """``Engine.server_args_class``: SGLang's own, but for an engine that gives ``pevlm_…``."""

    def __init__(self, upstream: Any) -> None:
        self._upstream = upstream

    def __get__(self, engine: Any, _owner: type) -> Any:
        return self._upstream if engine is None else self._build

    def _build(self, **kwargs: Any) -> Any:
        given = flags.given_flags(kwargs)
        server_args = self._upstream(**kwargs)
        if given:
            server_args._pevlm_flags = given
        return server_args


@_hook("sglang.srt.server_args.ServerArgs.resolve_once", "self")
def _around_resolve_once(resolve_once: Any, server_args: Any) -> None:
    """Swap the name for the base's before SGLang resolves, and check what came out of it."""
    resolved_before = getattr(server_args, "_resolution_finished", False)
    if not resolved_before:
        try:
            config = flags.requested(server_args, getattr(server_args, "_pevlm_flags", {}))
        except ValueError as error:
            _stop(error)
        if config is not None:
            server_args._pevlm_config = config
            flags.write_base_backend(server_args, config)
    config = getattr(server_args, "_pevlm_config", None)
    _Process.config, _Process.family = config, None
    if config is None:
        resolve_once(server_args)
        return
    registry.read_checkpoints()
    resolve_once(server_args)
    video_url.offer_wishes()
    limits.install(config, server_args.host)
    if not resolved_before:
        _check_resolved(server_args, config)
    _Process.family = registry.family_of(server_args._pevlm_architectures)


def _check_resolved(server_args: Any, config: PevlmConfig) -> None:
    """Refuse what SGLang resolved, or log the configuration; once a server.

    Raises:
        UnsupportedError: see ``refusals`` and ``registry``.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view

    hf_config = model_config_of(server_args).hf_config
    registry.span_rule(hf_config)  # before the weights are loaded
    resolved = resolved_view(server_args)
    if resolved.dp_size > 1 and _CONTROLLER not in _HOOKS:
        raise UnsupportedError(
            f"--dp-size: expected 1, got {resolved.dp_size}; this SGLang's data-parallel "
            "controller cannot say whether its schedulers run PEVLM. Install sglang>=0.5.23"
        )
    refusals.check_server_args(resolved, config)
    refusals.check_environment()
    registry.check_launch(hf_config, (resolved.mm_process_config or {}).get("video", {}))
    server_args._pevlm_architectures = list(hf_config.architectures)
    able = registry.family_of(hf_config.architectures).gpu_pixels
    device = pixel_device.choose(config.media_device, resolved, able=able)
    setattr(server_args, pixel_device.CHOSEN, str(device))
    registry.offer_chat_template(registry.family_of(hf_config.architectures), resolved.model_path)
    if warning := seams.untested_version(importlib.metadata.version("sglang")):
        logger.warning("PEVLM: %s", warning)
    logger.info("PEVLM configuration: %s", config.describe())


@_hook("sglang.srt.managers.multimodal_processor.get_mm_processor_cls", "hf_config")
def _after_get_mm_processor_cls(
    processor: type | None, hf_config: Any, *args: Any, **kwargs: Any
) -> type | None:
    if _Process.config is None:
        return processor
    return registry.processor_class(processor, hf_config)


@_hook(
    "sglang.srt.utils.hf_transformers.processor.get_processor",
    *("tokenizer_name", "model_name", "image_processor_backend"),
)
def _around_get_processor(get_processor: Any, *args: Any, **kwargs: Any) -> Any:
    load = _Process.family.load("load_processor") if _Process.family is not None else None
    if load is None:
        return get_processor(*args, **kwargs)
    return load(get_processor, *args, **kwargs)


@_hook("sglang.srt.model_loader.utils.get_model_architecture", "model_config")
def _around_get_model_architecture(get_model_architecture: Any, config: Any) -> tuple[type, str]:
    if _Process.config is None:
        found: tuple[type, str] = get_model_architecture(config)
        return found
    registry.register_model(config.hf_config.architectures)
    model, name = get_model_architecture(config)
    return registry.model_class(model, name), name


@_hook("sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request", "obj")
def _around_generate_request(
    generate_request: Any, manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    if _Process.config is None:
        return generate_request(manager, obj, *args, **kwargs)
    stages.begin()
    if hasattr(obj, "sampling_params"):
        request_fields.check(obj, manager.model_config.vocab_size)
    outputs = generate_request(manager, obj, *args, **kwargs)
    if not (manager.enable_metrics and obj.contains_mm_input()):
        return outputs
    return stages.until_first_token(outputs, obj)


@_hook("sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request", "tokenized_obj")
def _around_send_one_request(send_one_request: Any, manager: Any, tokenized_obj: Any) -> Any:
    if _Process.config is None:
        return send_one_request(manager, tokenized_obj)
    return transport.send(send_one_request, manager, tokenized_obj)


# --- The scheduler ---------------------------------------------------------------------------


@_hook(
    "sglang.srt.model_executor.model_runner_components.attention_backend_setup"
    ".build_attention_backends",
    "model_runner",
)
def _after_build_attention_backends(result: Any, *, model_runner: Any) -> None:
    """Put PEVLM on the backend that serves prefill, or stop the server."""
    config = getattr(model_runner.server_args, "_pevlm_config", None)
    if config is None or model_runner.is_draft_worker:
        return
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_parallel

    from pevlm_sglang.attention.bases import attach
    from pevlm_sglang.attention.kernel_choice import attention_layers, requested_kernel

    if missing := [target for target in _HOOKS if target not in HookRegistry._patched]:
        _stop(f"SGLang did not apply the hooks on {', '.join(missing)}; see the log above")
    first_rank = is_first_rank(get_parallel())
    observer = Observer(
        log=first_rank, metrics=first_rank and model_runner.server_args.enable_metrics
    )
    backend = result.attn_backend
    hybrid = isinstance(backend, HybridAttnBackend)
    prefill_backend = backend.prefill_backend if hybrid else backend
    resolved = resolved_view(model_runner.server_args)
    hf_config = model_runner.model_config.hf_config
    family = registry.family_of(hf_config.architectures)
    rule = registry.span_rule(hf_config)
    refusals.check_model(model_runner)
    passed_over = attach(
        prefill_backend,
        observer,
        layers=attention_layers(model_runner.model),
        dtype=model_runner.dtype,
        kernel=requested_kernel(resolved, config),
    )
    holder = embeddings.EmbeddingHolder(observer)
    architecture = next(name for name in hf_config.architectures if name in family.checkpoints)
    if (install := family.load("install_in_scheduler")) is not None:
        install(architecture)
    embeddings.install(holder)
    corrections = (*family.corrected(hf_config), embeddings.EACH_STEP_ONCE)
    if hybrid:
        pass_on_vetoes(backend)
    _Process.serving = _Serving(
        config,
        rule,
        observer,
        holder,
        corrections,
        prefill_backend.pevlm_kernel,
        max(resolved.chunked_prefill_size or 0, 0) or None,
    )
    if first_rank:
        steps = rule.frames_per_step
        logger.info(
            "PEVLM is active on %s, prefill kernel %s: sink of %d frames (%d steps), blocks of %d "
            "frames (%d steps), %d sampled frames a step",
            result.prefill_attention_backend_str,
            prefill_backend.pevlm_kernel,
            config.sink_frames,
            whole_steps(config.sink_frames, steps),
            config.block_frames,
            whole_steps(config.block_frames, steps),
            steps,
        )
        if passed_over:
            logger.info("PEVLM prefill kernel auto passed over %s", passed_over)
        logger.info("PEVLM vision corrections: %s", "; ".join(corrections))


@_hook("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", "batch")
def _after_forward_batch(_result: Any, _cls: type, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Just before its forward. SGLang puts the decode rows of a mixed batch last."""
    if (serving := _Process.serving) is not None:
        serving.observer.decode_rows = len(getattr(batch, "decoding_reqs", None) or ())


@_hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", "forward_batch")
def _around_forward(
    forward: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    serving = _Process.serving
    if serving is None or runner.is_draft_worker or not is_prefill(forward_batch.forward_mode):
        return forward(runner, forward_batch, *args, **kwargs)
    with serving.observer.prefill(forward_batch.input_ids.device):
        return forward(runner, forward_batch, *args, **kwargs)


def is_prefill(mode: Any) -> bool:
    """Whether a forward of SGLang's ``ForwardMode`` has a prompt's tokens."""
    if not mode.is_extend():  # decode, which is asked most
        return False
    from pevlm_sglang.attention.backend import PREFILL_MODES

    return mode in PREFILL_MODES


def is_first_rank(parallel: Any) -> bool:
    """Whether this is the one rank of its replica that logs and counts."""
    return bool(parallel.attn_tp_rank == 0 and parallel.pp_rank == 0)


def pass_on_vetoes(hybrid: Any) -> None:
    """SGLang asks its wrapper of two backends, which does not ask the one of prefill."""
    for veto in ("can_run_prefill_cuda_graph", "vote_prefill_cuda_graph"):
        setattr(hybrid, veto, getattr(hybrid.prefill_backend, veto))


@_hook("sglang.srt.managers.schedule_batch.Req.__init__", "sampling_params", "extra_key", "session")
def _after_req_init(_result: None, req: Any, *args: Any, **kwargs: Any) -> None:
    if _Process.serving is not None:
        requests.on_created(req, _Process.serving.config)


@_hook(f"{_SCHEDULER}._add_request_to_queue", "req", "is_retracted")
def _before_add_request_to_queue(
    _scheduler: Any, req: Any, *args: Any, is_retracted: bool = False, **kwargs: Any
) -> None:
    if (serving := _Process.serving) is not None:
        serving.holder.release(req.multimodal_inputs)
        if not is_retracted:
            requests.on_queued(req, serving.rule, serving.forward_tokens)


@_hook(f"{_SCHEDULER}.flush_cache")
def _after_state_is_outdated(_result: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang flushes keys and values, and keeps the embeddings of the tower's old weights."""
    if (serving := _Process.serving) is not None:
        serving.holder.forget()


for _name in (
    *("update_weights_from_disk", "update_weights_from_distributed", "update_weights_from_tensor"),
    *("update_weights_from_ipc", "release_memory_occupation"),
):
    _hook(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        f".{_name}",
        "recv_req",
    )(_after_state_is_outdated)


# --- Seen from outside -----------------------------------------------------------------------


@_hook(f"{_SCHEDULER}.get_init_info")
def _after_get_init_info(info: dict[str, Any], scheduler: Any) -> None:
    if (serving := _Process.serving) is not None:
        info[SERVER_INFO_KEY] = {
            **serving.config.describe(),
            "media_device": getattr(scheduler.server_args, pixel_device.CHOSEN),
            "base_backend": scheduler.tp_worker.model_runner.prefill_attention_backend_str,
            "prefill_kernel": serving.prefill_kernel,
            "frames_per_step": serving.rule.frames_per_step,
            "vision_corrections": list(serving.corrections),
        }


@_hook(f"{_SCHEDULER}.get_internal_state", "recv_req")
def _after_get_internal_state(output: Any, _scheduler: Any, _request: Any) -> None:
    if (serving := _Process.serving) is not None:
        serving.holder.report()
        output.internal_state[SERVER_INFO_KEY] = serving.observer.describe()


@_hook(_CONTROLLER)
def _after_controller_init_info(info: dict[str, Any], controller: Any) -> None:
    """A data-parallel controller speaks for its schedulers: for all of them, or not at all."""
    reports = [i.get(SERVER_INFO_KEY) for i in controller._scheduler_init_infos]
    if reports and all(reports):
        info[SERVER_INFO_KEY] = reports[0]


@_hook(
    "sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
    *("scheduler_pipe_readers", "scheduler_procs"),
)
def _after_wait_for_scheduler_ready(
    infos: list[dict[str, Any]], _pipes: Any, schedulers: list[Any]
) -> None:
    """The launcher's check: no scheduler may serve full attention under PEVLM's name."""
    if _Process.config is None:
        return
    silent = [rank for rank, info in enumerate(infos) if not info.get(SERVER_INFO_KEY)]
    if silent:
        for process in schedulers:
            process.kill()
        _stop(
            f"schedulers {silent} do not report PEVLM active; check that pevlm-sglang is installed "
            "in their environment and that SGLANG_PLUGINS, if set, names pevlm"
        )
    endpoints.guard_http_server()
