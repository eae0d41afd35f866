"""The plugin's own server arguments, read off :class:`PevlmConfig`: command line, ``sglang.Engine``
keywords, and what they mean."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from pevlm_sglang.settings.config import PevlmConfig, flag, preset_names, resolve

NAME = "pevlm"
BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


class ArgumentConflictError(ValueError):
    """Server arguments that contradict each other; the server is refused with this message."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--pevlm-…``. A flag that is not given leaves no trace in the namespace."""
    group = parser.add_argument_group("PEVLM (--attention-backend pevlm)")
    absent: Any = argparse.SUPPRESS
    for option in dataclasses.fields(PevlmConfig):
        if option.default is False:
            form: dict[str, Any] = {"action": "store_true"}
        elif option.default is True:
            form = {"type": _boolean, "metavar": "{true,false}"}
        else:
            form = {"type": type(option.default), "choices": option.metadata["choices"]}
        text = PevlmConfig.help(option.name)
        group.add_argument(flag(f"pevlm_{option.name}"), default=absent, help=text, **form)
    group.add_argument(
        "--pevlm-config",
        default=absent,
        metavar="PRESET|FILE",
        help=f"a preset ({', '.join(preset_names())}) or a YAML file with any of these options; "
        "flags take precedence over it",
    )


def _boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


def given_flags(values: dict[str, Any]) -> dict[str, Any]:
    """The plugin's own values among server arguments, without their prefix; removed from them."""
    names = (*PevlmConfig.option_names(), "config")
    return {name: values.pop(f"pevlm_{name}") for name in names if f"pevlm_{name}" in values}


def requested(server_args: Any, flags: dict[str, Any]) -> PevlmConfig | None:
    """What SGLang's ``ServerArgs``, before resolution, ask of PEVLM beside :func:`given_flags`;
    None where they do not ask for it.

    Raises:
        ArgumentConflictError: PEVLM options without PEVLM, or PEVLM for decode alone.
        ValueError: see :func:`pevlm_sglang.settings.config.resolve`.
    """
    chosen = _fields_with_name(server_args)
    if flags and not chosen:
        raise ArgumentConflictError(
            f"{', '.join(flag(f'pevlm_{name}') for name in flags)}: expected --attention-backend "
            f"pevlm beside it, got {server_args.attention_backend or 'no --attention-backend'}"
        )
    if chosen == ["decode_attention_backend"]:
        raise ArgumentConflictError(
            "--decode-attention-backend pevlm: PEVLM changes prefill alone; "
            "use --attention-backend pevlm or --prefill-attention-backend pevlm"
        )
    options = dict(flags)
    return resolve(options.pop("config", None), options) if chosen else None


def write_base_backend(server_args: Any, config: PevlmConfig) -> None:
    """Put the base backend's name where ``pevlm`` stands.

    SGLang decides much by this name (page sizes, CUDA graphs, speculative decoding), and would miss
    it all for a name that it does not know. None lets SGLang pick its default.
    """
    for name in _fields_with_name(server_args):
        setattr(server_args, name, None if config.base_backend == "auto" else config.base_backend)


def _fields_with_name(server_args: Any) -> list[str]:
    return [name for name in BACKEND_FIELDS if getattr(server_args, name, None) == NAME]
