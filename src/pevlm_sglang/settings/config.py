"""What the user sets: defaults < YAML file < command line < request. Names and defaults live in the
dataclass alone, against whose fields all of these are read."""

from __future__ import annotations

import dataclasses
import hashlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASE_BACKENDS = ("auto", "fa3", "fa4", "flashinfer", "trtllm_mha", "triton", "torch_native")
PREFILL_KERNELS = ("auto", "base", "flash", "triton", "sdpa")
"""``base``: the base backend's own, on rewritten metadata; the others are of ``pevlm_kernels``."""

VIDEO_RESIZES = ("uint8", "float32")
MEDIA_DEVICES = ("auto", "cpu", "cuda")

MAX_FRAMES = 1_000_000
"""More sampled frames than any context holds; a bound, so that a number can always be handled."""

PRESETS = Path(__file__).parent.parent / "presets"
"""Folder of the presets; in a checkout it leads to ``configs`` at the top."""

RULES_VERSION = 1
"""Part of the cache namespace: raise it when ``layout.py`` gives the same setting another mask."""


def _option(
    default: Any, text: str, *, least: int = 0, per_request: bool = True, choices: Any = None
) -> Any:
    metadata = {"help": text, "least": least, "per_request": per_request, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class PevlmConfig:
    """The resolved configuration of a server or of one request; ValueError for a value of the wrong
    type or out of range."""

    enabled: bool = _option(True, "run PEVLM; false is ordinary full attention")
    sink_frames: int = _option(
        16, "sampled frames in the sink of each video; 0 = the text before it only"
    )
    block_frames: int = _option(16, "sampled frames in a context block", least=1)
    image_runs: bool = _option(
        False, "treat neighbouring images (at most 32 tokens apart) as a video"
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
    video_resize: str = _option(
        "uint8",
        "how Qwen's frames are resized: uint8 = as by transformers' video processors; float32 = as "
        "by qwen-vl-utils, slower",
        per_request=False,
        choices=VIDEO_RESIZES,
    )
    media_device: str = _option(
        "auto",
        "where decoded frames are resized, normalised and cut in patches; auto = on the server's "
        "GPU where it has one and the model's processor can",
        per_request=False,
        choices=MEDIA_DEVICES,
    )
    media_memory_mb: int = _option(
        512,
        "decoded frames in the launcher's memory at a time, of all requests together, in MiB",
        least=64,
        per_request=False,
    )
    media_cache_mb: int = _option(
        4096,
        "videos that stay prepared in shared memory for the next question, in MiB; 0 = none",
        per_request=False,
    )
    media_paths: str = _option(
        "",
        "directories, with colons between them, below which requests may name files; empty = all "
        "where the server listens on its own machine alone, none elsewhere; / = all",
        per_request=False,
    )
    max_source_mb: int = _option(
        4096,
        "of a file, of a download, or of media inside a request, in MiB; a download's size is "
        "bounded by SGLang's --media-url-max-file-size-mb too",
        least=1,
        per_request=False,
    )
    max_fetch_seconds: int = _option(
        60, "of a download, redirects included", least=1, per_request=False
    )
    max_redirects: int = _option(5, "of a download", per_request=False)
    max_video_seconds: int = _option(
        14_400, "of a video, whose sampled frames are decoded", least=1, per_request=False
    )
    max_frame_megapixels: int = _option(
        64,
        "of a video's frame before its resize, x 1,048,576",
        least=1,
        per_request=False,
    )
    max_request_megapixels: int = _option(
        16_384,
        "of all sampled frames and images of a request before their resize, x 1,048,576",
        least=1,
        per_request=False,
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value: Any = getattr(self, option.name)
            kind: Any = type(option.default)
            least, choices = option.metadata["least"], option.metadata["choices"]
            if type(value) is not kind:  # bool is an int, and must not pass for one
                expected = kind.__name__
            elif choices and value not in choices:
                expected = f"one of {', '.join(choices)}"
            elif kind is int and value < least:
                expected = f">= {least}"
            elif kind is int and value > MAX_FRAMES:
                expected = f"<= {MAX_FRAMES}"
            else:
                continue
            raise ValueError(f"{option.name}: expected {expected}, got {_shown(value)}")

    @classmethod
    def option_names(cls, *, per_request: bool = False) -> tuple[str, ...]:
        """Names of all options, or of those that a request may override."""
        return tuple(
            f.name for f in dataclasses.fields(cls) if f.metadata["per_request"] or not per_request
        )

    @classmethod
    def help(cls, name: str) -> str:
        """What an option is, and its default."""
        option = cls.__dataclass_fields__[name]
        return f"{option.metadata['help']} (default: {str(option.default).lower()})"

    def override(self, values: Mapping[str, Any], *, per_request: bool = False) -> PevlmConfig:
        """This configuration with some values replaced.

        Raises:
            ValueError: an unknown name, beside the valid ones, or a bad value.
        """
        valid = self.option_names(per_request=per_request)
        if unknown := [name for name in values if name not in valid]:
            shown = ", ".join(map(_shown, unknown[:3]))
            shown += f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise ValueError(f"unknown option {shown}; valid options: {', '.join(valid)}")
        return dataclasses.replace(self, **values)

    def for_request(self, custom_params: Any) -> PevlmConfig:
        """The configuration of one request, whose override is the value under ``"pevlm"`` of its
        ``sampling_params.custom_params``: a flat mapping of any of the per-request options.

        Raises:
            ValueError: see :meth:`override`.
        """
        values = custom_params.get("pevlm") if isinstance(custom_params, Mapping) else None
        if values is None:
            return self
        try:
            if not isinstance(values, Mapping):
                valid = ", ".join(self.option_names(per_request=True))
                raise ValueError(f"expected a mapping with any of {valid}, got {_shown(values)}")
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


def resolve(
    file: str | Path | None, flags: Mapping[str, Any], *, prefix: str = "pevlm_"
) -> PevlmConfig:
    """The server's configuration.

    Args:
        file: a YAML file with any of the options, or None; see :func:`find_file`.
        flags: values that the command line or ``Engine(...)`` gave; those not given are absent.
        prefix: of the flags' names, which an error spells as they were typed.

    Raises:
        ValueError: a file that is missing or not a mapping, an unknown name, a bad value.
    """
    values = {} if file is None else load_file(find_file(file))
    for name, value in flags.items():
        try:
            PevlmConfig().override({name: value})
        except ValueError as error:
            if not str(error).startswith(f"{name}: "):
                raise
            typed = flag(prefix + name)
            raise ValueError(typed + str(error).removeprefix(name)) from None
    return PevlmConfig().override({**values, **flags})


def flag(name: str) -> str:
    """An option's name as the command line spells it."""
    return "--" + name.replace("_", "-")


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
    content = {} if content is None else content
    try:
        if not isinstance(content, dict):
            raise ValueError(f"expected a mapping of options, got {type(content).__name__}")
        PevlmConfig().override(content)
    except ValueError as error:
        raise ValueError(f"pevlm config {path}: {error}") from None
    return content


def _shown(value: Any) -> str:
    """A value for an error message, cut so that a huge request cannot flood the log."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
