"""SGLang's door: the entry point ``sglang.srt.plugins`` and the hooks.

Every hook is a few lines; what they do lives in the modules that they call. SGLang's plugin loader
logs and swallows exceptions, which would leave a server with full attention under PEVLM's name. So
the seams are checked first, the backend's name is registered last, and the launcher believes a
scheduler only when it reports PEVLM active.
"""

from __future__ import annotations

import logging
import pkgutil
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from pevlm_sglang import (
    arguments,
    corrections,
    embeddings,
    external,
    processors,
    requests,
    support,
    vision,
)
from pevlm_sglang.families.llava_video.loading import load_processor
from pevlm_sglang.families.spans import SpanRule
from pevlm_sglang.layout import whole_steps
from pevlm_sglang.media import video_url
from pevlm_sglang.observe.observer import Observer
from pevlm_sglang.settings.config import PevlmConfig
from pevlm_sglang.settings.refusals import UnsupportedError

logger = logging.getLogger(__name__)

SERVER_INFO_KEY = "pevlm"

_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info"
"""Since SGLang 0.5.23; before it, PEVLM does without data parallelism."""

_HOOKS = {
    "sglang.srt.server_args.ServerArgs.add_cli_args": "_after_add_cli_args",
    "sglang.srt.server_args.ServerArgs.from_cli_args": "_after_from_cli_args",
    "sglang.srt.server_args.ServerArgs.resolve_once": "_around_resolve_once",
    "sglang.srt.model_executor.model_runner_components.attention_backend_setup"
    ".build_attention_backends": "_after_build_attention_backends",
    "sglang.srt.managers.multimodal_processor.get_mm_processor_cls": "_after_get_mm_processor_cls",
    "sglang.srt.utils.hf_transformers.processor.get_processor": "_around_get_processor",
    "sglang.srt.model_loader.utils.get_model_architecture": "_around_get_model_architecture",
    "sglang.srt.managers.schedule_batch.Req.__init__": "_after_req_init",
    "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue": "_before_add_request_to_queue",
    "sglang.srt.managers.scheduler.Scheduler.get_init_info": "_after_get_init_info",
    "sglang.srt.managers.scheduler.Scheduler.get_internal_state": "_after_get_internal_state",
    _CONTROLLER: "_after_controller_init_info",
    "sglang.srt.entrypoints.engine._wait_for_scheduler_ready": "_after_wait_for_scheduler_ready",
}
"""SGLang's function → the hook here; the first word of the hook's name is its kind."""


@dataclass(frozen=True)
class _Serving:
    """PEVLM in a scheduler process, once its backend is in place.

    Attributes:
        config: of the server.
        rule: how the model's frames are found.
        observer: what was computed so far.
        keeper: of the embeddings that prefill has begun to use.
        vision_corrections: what is corrected in SGLang's vision path, in words.
        prefill_kernel: what computes a forward with LOCAL tokens.
    """

    config: PevlmConfig
    rule: SpanRule
    observer: Observer
    keeper: embeddings.Keeper
    vision_corrections: tuple[str, ...]
    prefill_kernel: str


class _Process:
    """What this process knows: a launcher the configuration, a scheduler both."""

    config: PevlmConfig | None = None
    serving: _Serving | None = None


def register() -> None:
    """Entry point: hook SGLang, then offer the backend's name.

    Where a seam has moved the name is not offered, so that ``--attention-backend pevlm`` is refused
    by SGLang itself and every other server starts as before.
    """
    if not _exists(_CONTROLLER):
        _HOOKS.pop(_CONTROLLER, None)
    missing = [target for target in _HOOKS if not _exists(target)]
    if missing:
        logger.error(
            "PEVLM is not available: this SGLang lacks %s; install sglang>=0.5.21 (developed on "
            "0.5.23) or a newer pevlm-sglang",
            ", ".join(missing),
        )
        return
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices

    external.register_checkpoints()
    for target, name in _HOOKS.items():
        kind = HookType[name.split("_")[1].upper()]
        HookRegistry.register(target, globals()[name], kind)
    Engine.server_args_class = staticmethod(_engine_server_args)
    register_attention_backend(arguments.NAME)(_refuse_unresolved_name)
    add_attention_backend_choices([arguments.NAME])


def _exists(target: str) -> bool:
    owner, name = target.rsplit(".", 1)
    try:
        return hasattr(pkgutil.resolve_name(owner), name)
    except (ImportError, AttributeError):
        return False


def _stop(reason: object) -> NoReturn:
    """End this process with one line. SystemExit, because SGLang swallows every Exception."""
    message = f"PEVLM: {reason}"
    logger.error(message)
    sys.exit(message)


def _refuse_unresolved_name(runner: Any) -> NoReturn:
    _stop(
        "the backend's name reached SGLang's registry unresolved, so the plugin's hooks are not in "
        "place in this process; check the log above for 'Failed to apply hooks'"
    )


# --- Server arguments ------------------------------------------------------------------------


def _after_add_cli_args(_result: None, parser: Any) -> None:
    arguments.add_flags(parser)


def _after_from_cli_args(server_args: Any, _cls: type, namespace: Any) -> None:
    server_args._pevlm_flags = arguments.given_flags(dict(vars(namespace)))


def _engine_server_args(**kwargs: Any) -> Any:
    """``ServerArgs`` from the keywords of ``sglang.Engine``."""
    from sglang.srt.server_args import ServerArgs

    flags = arguments.given_flags(kwargs)
    server_args = ServerArgs(**kwargs)
    server_args._pevlm_flags = flags
    return server_args


def _around_resolve_once(resolve_once: Any, server_args: Any) -> None:
    """Swap the name for the base's before SGLang resolves, and check what came out of it."""
    resolved_before = getattr(server_args, "_resolution_finished", False)
    if not resolved_before:
        try:
            config = arguments.requested(server_args, getattr(server_args, "_pevlm_flags", {}))
        except ValueError as error:
            _stop(error)
        server_args._pevlm_config = config
        if config is not None:
            arguments.write_base_backend(server_args, config)
    resolve_once(server_args)
    config = getattr(server_args, "_pevlm_config", None)
    _Process.config = config
    if config is None:
        return
    try:
        video_url.offer_max_pixels()
        if config.vision_fixes:
            vision.hash_frame_rates()
        if not resolved_before:
            _check_resolved(server_args, config)
    except UnsupportedError as error:
        _stop(error)


def _check_resolved(server_args: Any, config: PevlmConfig) -> None:
    """Refuse what SGLang resolved, or log the configuration; once a server.

    Raises:
        UnsupportedError: see :meth:`pevlm_sglang.families.spans.SpanRule.of_model`,
            :func:`pevlm_sglang.settings.refusals.check_server_args` and
            :func:`pevlm_sglang.families.registry.check_launch`.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view

    hf_config = model_config_of(server_args).hf_config
    SpanRule.of_model(hf_config)  # before the weights are loaded
    resolved = resolved_view(server_args)
    if resolved.dp_size > 1 and _CONTROLLER not in _HOOKS:
        raise UnsupportedError(
            f"--dp-size: expected 1, got {resolved.dp_size}; this SGLang's data-parallel "
            "controller cannot say whether its schedulers run PEVLM. Install sglang>=0.5.23"
        )
    support.check_server_args(resolved, config)
    if _in_our_hands(hf_config):
        settings = (resolved.mm_process_config or {}).get("video", {})
        processors.check_launch(hf_config, settings, vision_fixes=config.vision_fixes)
        processors.offer_chat_template(hf_config.architectures or (), resolved.model_path)
    logger.info("PEVLM configuration: %s", config.describe())


def _after_get_mm_processor_cls(
    processor: type | None, hf_config: Any, *args: Any, **kwargs: Any
) -> type | None:
    with_pevlm = _Process.config is not None and _in_our_hands(hf_config)
    try:
        return processors.for_architectures(
            processor, hf_config.architectures or (), with_pevlm=with_pevlm
        )
    except UnsupportedError as error:
        _stop(error)


def _in_our_hands(hf_config: Any) -> bool:
    """Whether a processor here finds the model that it prepares its tokens for."""
    assert _Process.config is not None
    needs_model = any(map(corrections.corrected, hf_config.architectures or ()))
    return _Process.config.vision_fixes or not needs_model


def _around_get_processor(get_processor: Any, *args: Any, **kwargs: Any) -> Any:
    if _Process.config is None or not _Process.config.vision_fixes:
        return get_processor(*args, **kwargs)
    return load_processor(get_processor, *args, **kwargs)


def _around_get_model_architecture(get_model_architecture: Any, config: Any) -> tuple[type, str]:
    external.register_models(config.hf_config.architectures or ())
    model, name = get_model_architecture(config)
    if _Process.config is not None and _Process.config.vision_fixes:
        try:
            model = corrections.for_architecture(model, name)
        except UnsupportedError as error:
            _stop(error)
    return model, name


# --- The scheduler ---------------------------------------------------------------------------


def _after_build_attention_backends(result: Any, *, model_runner: Any) -> None:
    """Put PEVLM on the backend that serves prefill, or stop the server."""
    config = getattr(model_runner.server_args, "_pevlm_config", None)
    if config is None or model_runner.is_draft_worker:
        return
    _stop_unless_hooked()
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.runtime_context import get_parallel

    from pevlm_sglang.attention.bases import attach
    from pevlm_sglang.attention.kernel_choice import attention_layers, requested_kernel

    parallel = get_parallel()
    first_rank = parallel.attn_tp_rank == 0 and parallel.pp_rank == 0  # of a replica
    observer = Observer(
        log=first_rank, metrics=first_rank and model_runner.server_args.enable_metrics
    )
    backend = result.attn_backend
    hybrid = isinstance(backend, HybridAttnBackend)
    prefill_backend = backend.prefill_backend if hybrid else backend
    try:
        rule = SpanRule.of_model(model_runner.model_config.hf_config)
        support.check_model(model_runner)
        passed_over = attach(
            prefill_backend,
            observer,
            layers=attention_layers(model_runner.model),
            dtype=model_runner.dtype,
            kernel=requested_kernel(resolved_view(model_runner.server_args), config),
        )
        keeper = embeddings.Keeper(observer)
        fixes = vision.install(model_runner.model_config.hf_config.model_type, config)
        fixes += corrections.described(model_runner.model)
        fixes += embeddings.install(keeper, config)
    except UnsupportedError as error:
        _stop(error)
    if hybrid:  # the wrapper does not pass these on, and SGLang asks the wrapper
        for veto in ("can_run_prefill_cuda_graph", "vote_prefill_cuda_graph"):
            setattr(backend, veto, getattr(prefill_backend, veto))
    _Process.serving = _Serving(config, rule, observer, keeper, fixes, prefill_backend.pevlm_kernel)
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
        logger.info("PEVLM vision corrections: %s", "; ".join(fixes) or "none")


def _stop_unless_hooked() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _HOOKS if target not in HookRegistry._patched]
    if missing:
        _stop(f"SGLang did not apply the hooks on {', '.join(missing)}; see the log above")


def _after_req_init(_result: None, req: Any, *args: Any, **kwargs: Any) -> None:
    if _Process.serving is not None:
        requests.on_created(req, _Process.serving.config)


def _before_add_request_to_queue(
    _scheduler: Any, req: Any, *args: Any, is_retracted: bool = False, **kwargs: Any
) -> None:
    if (serving := _Process.serving) is not None:
        serving.keeper.release(req.multimodal_inputs)
        if not is_retracted:
            requests.on_queued(req, serving.rule)


# --- Seen from outside -----------------------------------------------------------------------


def _after_get_init_info(info: dict[str, Any], scheduler: Any) -> None:
    if (serving := _Process.serving) is not None:
        info[SERVER_INFO_KEY] = {
            **serving.config.describe(),
            "base_backend": scheduler.tp_worker.model_runner.prefill_attention_backend_str,
            "prefill_kernel": serving.prefill_kernel,
            "frames_per_step": serving.rule.frames_per_step,
            "vision_corrections": list(serving.vision_corrections),
        }


def _after_get_internal_state(output: Any, _scheduler: Any, _request: Any) -> None:
    if (serving := _Process.serving) is not None:
        serving.keeper.report()
        output.internal_state[SERVER_INFO_KEY] = serving.observer.describe()


def _after_controller_init_info(info: dict[str, Any], controller: Any) -> None:
    """A data-parallel controller speaks for its schedulers: for all of them, or not at all."""
    reports = [i.get(SERVER_INFO_KEY) for i in controller._scheduler_init_infos]
    if reports and all(reports):
        info[SERVER_INFO_KEY] = reports[0]


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
