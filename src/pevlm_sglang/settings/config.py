"""What the user sets: defaults < YAML file < command line < request.

The dataclass is the one place where names and defaults live: the command line, the YAML file and
the per-request override are all read against its fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASE_BACKENDS = ("auto", "fa3", "fa4", "flashinfer", "trtllm_mha", "triton", "torch_native")
PREFILL_KERNELS = ("auto", "base", "flash", "triton", "sdpa")
"""``base``: the base backend's own, on rewritten metadata; the others are of ``pevlm_kernels``."""

MAX_FRAMES = 1_000_000
"""More sampled frames than any context holds; a bound, so that a number can always be handled."""

PRESETS = Path(__file__).parent.parent / "presets"
"""Folder of the presets; in a checkout it leads to ``configs`` at the top."""

RULES_VERSION = 1
"""Part of the cache namespace: raise it when ``layout.py`` gives the same setting another mask."""


def _option(
    default: Any, help_text: str, *, per_request: bool, choices: tuple[str, ...] | None = None
) -> Any:
    metadata = {"help": help_text, "per_request": per_request, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class PevlmConfig:
    """The resolved configuration of a server or of one request.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    enabled: bool = _option(True, "run PEVLM; false is ordinary full attention", per_request=True)
    sink_frames: int = _option(
        16,
        "sampled frames in the sink of each video; 0 = the text before it only",
        per_request=True,
    )
    block_frames: int = _option(16, "sampled frames in a context block", per_request=True)
    image_runs: bool = _option(
        False, "treat neighbouring images (at most 32 tokens apart) as a video", per_request=True
    )
    base_backend: str = _option(
        "auto",
        "SGLang's attention backend to build on; auto = the one SGLang would pick",
        per_request=False,
        choices=BASE_BACKENDS,
    )
    prefill_kernel: str = _option(
        "auto",
        "what computes a prefill with blocks; base = the base backend's own kernel; auto = the one "
        "expected to be fastest on the base backend and GPU",
        per_request=False,
        choices=PREFILL_KERNELS,
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, expected = getattr(self, option.name), type(option.default)
            if type(value) is not expected:  # bool is an int, and must not pass for one
                raise ValueError(
                    f"{option.name}: expected {expected.__name__}, got {_shown(value)}"
                )
            choices = option.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(
                    f"{option.name}: expected one of {', '.join(choices)}, got {_shown(value)}"
                )
        for name, least in (("sink_frames", 0), ("block_frames", 1)):
            value = getattr(self, name)
            if not least <= value <= MAX_FRAMES:
                bound = f">= {least}" if value < least else f"<= {MAX_FRAMES}"
                raise ValueError(f"{name}: expected {bound}, got {_shown(value)}")

    @classmethod
    def option_names(cls, *, per_request: bool = False) -> tuple[str, ...]:
        """Names of all options, or of those that a request may override."""
        return tuple(
            f.name for f in dataclasses.fields(cls) if f.metadata["per_request"] or not per_request
        )

    def override(self, values: Mapping[str, Any], *, per_request: bool = False) -> PevlmConfig:
        """This configuration with some values replaced.

        Raises:
            ValueError: an unknown name (the message lists the valid ones) or a bad value.
        """
        _check_names(values, self.option_names(per_request=per_request))
        return dataclasses.replace(self, **values)

    def for_request(self, custom_params: Any) -> PevlmConfig:
        """The configuration of one request.

        Args:
            custom_params: SGLang's ``sampling_params.custom_params``; the override is its value
                under ``"pevlm"``, a flat mapping of any subset of the per-request options.

        Raises:
            ValueError: see :meth:`override`.
        """
        values = custom_params.get("pevlm") if isinstance(custom_params, Mapping) else None
        if values is None:
            return self
        valid = self.option_names(per_request=True)
        if not isinstance(values, Mapping):
            raise ValueError(
                f"custom_params['pevlm']: expected a mapping with any of {', '.join(valid)}, "
                f"got {_shown(values)}"
            )
        try:
            return self.override(values, per_request=True)
        except ValueError as error:
            raise ValueError(f"custom_params['pevlm']: {error}") from None

    @property
    def cache_namespace(self) -> str | None:
        """Tag of the KV that is computed under this configuration; None when PEVLM is off."""
        if not self.enabled:
            return None
        key = (RULES_VERSION, self.sink_frames, self.block_frames, self.image_runs)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """The options as JSON-ready values, for the log and ``/server_info``."""
        return dataclasses.asdict(self)


def resolve(file: str | Path | None, flags: Mapping[str, Any]) -> PevlmConfig:
    """The server's configuration.

    Args:
        file: a YAML file with any of the options, or None; see :func:`find_file`.
        flags: values that the command line or ``Engine(...)`` gave; those not given are absent.

    Raises:
        ValueError: a file that is missing or not a mapping, an unknown name, a bad value.
    """
    config = PevlmConfig()
    if file is not None:
        config = config.override(load_file(find_file(file)))
    return config.override(flags)


def preset_names() -> tuple[str, ...]:
    """The presets that come with the package."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def find_file(file: str | Path) -> Path:
    """The file that a user named: a bare word, such as ``low-latency``, is a preset of the package;
    whatever has a folder or an ending, or is a ``Path``, is a path.

    Raises:
        ValueError: a bare word that is no preset; the message lists them.
    """
    path = Path(file)
    if isinstance(file, Path) or file != path.stem:
        return path
    if file not in preset_names():
        raise ValueError(
            f"pevlm config {_shown(file)}: expected a preset ({', '.join(preset_names())}) or the "
            "path of a YAML file, such as ./pevlm.yaml"
        )
    return PRESETS / f"{file}.yaml"


def load_file(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: the file is missing, is no YAML mapping, or has an unknown or bad option.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"pevlm config {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that is none
        raise ValueError(f"pevlm config {path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"pevlm config {path}: expected a mapping of options, got {type(content).__name__}"
        )
    try:
        PevlmConfig().override(content)
    except ValueError as error:
        raise ValueError(f"pevlm config {path}: {error}") from None
    return content


def _check_names(names: Iterable[Any], valid: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in valid]
    if unknown:
        shown = ", ".join(_shown(name) for name in unknown[:3]) + (
            f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        )
        raise ValueError(f"unknown option {shown}; valid options: {', '.join(valid)}")


def _shown(value: Any) -> str:
    """A value for an error message, cut so that a huge request cannot flood the log."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
