"""The plugin's own server arguments: command line, ``sglang.Engine`` keywords, and what they mean.

The parser is read off :class:`PevlmConfig`, so a default lives in one place.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from pevlm_sglang.settings.config import PevlmConfig, preset_names, resolve

NAME = "pevlm"
CONFIG_FILE = "pevlm_config"
BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


class ArgumentConflictError(ValueError):
    """Server arguments that contradict each other; the server is refused with this message."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--pevlm-…``. A flag that is not given leaves no trace in the namespace."""
    group = parser.add_argument_group("PEVLM (--attention-backend pevlm)")
    absent: Any = argparse.SUPPRESS
    for option in dataclasses.fields(PevlmConfig):
        settings: dict[str, Any] = {"default": absent, "dest": f"pevlm_{option.name}"}
        if option.default is False:
            settings["action"] = "store_true"
        elif option.default is True:
            settings |= {"type": _boolean, "metavar": "{true,false}"}
        else:
            settings["type"] = type(option.default)
        if option.metadata["choices"]:
            settings["choices"] = option.metadata["choices"]
        default = str(option.default).lower()
        group.add_argument(
            f"--pevlm-{option.name.replace('_', '-')}",
            help=f"{option.metadata['help']} (default: {default})",
            **settings,
        )
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
    names = [f"pevlm_{name}" for name in PevlmConfig.option_names()] + [CONFIG_FILE]
    return {name.removeprefix("pevlm_"): values.pop(name) for name in names if name in values}


def requested(server_args: Any, flags: dict[str, Any]) -> PevlmConfig | None:
    """What these server arguments ask of PEVLM; None where they do not ask for it.

    Args:
        server_args: SGLang's ``ServerArgs``, before resolution.
        flags: see :func:`given_flags`.

    Raises:
        ArgumentConflictError: PEVLM options without PEVLM, or PEVLM for decode alone.
        ValueError: see :func:`pevlm_sglang.settings.config.resolve`.
    """
    chosen = [name for name in BACKEND_FIELDS if getattr(server_args, name, None) == NAME]
    if not chosen:
        if flags:
            given = ", ".join(f"--pevlm-{name.replace('_', '-')}" for name in flags)
            raise ArgumentConflictError(
                f"{given}: expected --attention-backend pevlm beside it, got "
                f"{server_args.attention_backend or 'no --attention-backend'}"
            )
        return None
    if chosen == ["decode_attention_backend"]:
        raise ArgumentConflictError(
            "--decode-attention-backend pevlm: PEVLM changes prefill alone; "
            "use --attention-backend pevlm or --prefill-attention-backend pevlm"
        )
    options = dict(flags)
    return resolve(options.pop("config", None), options)


def write_base_backend(server_args: Any, config: PevlmConfig) -> None:
    """Put the base backend's name where ``pevlm`` stands.

    SGLang decides much by this name (page sizes, CUDA graphs, speculative decoding), and would miss
    it all for a name that it does not know. None lets SGLang pick its default.
    """
    base = None if config.base_backend == "auto" else config.base_backend
    for name in BACKEND_FIELDS:
        if getattr(server_args, name, None) == NAME:
            setattr(server_args, name, base)
