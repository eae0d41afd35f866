"""SGLang's multimodal processors, completed: one subclass a model family, beside its ``families``.

A processor turns a request's text and media into tokens and features. It runs in the launcher,
before the scheduler sees the request; a ``ValueError`` there is HTTP 400.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from pevlm_sglang.support import UnsupportedError

_QWEN_VL = "pevlm_sglang.processors.qwen_vl:QwenVLProcessor"

_PROCESSORS: dict[str, str] = {
    "Qwen2VLForConditionalGeneration": _QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    "Qwen3VLForConditionalGeneration": _QWEN_VL,
    "Qwen3VLMoeForConditionalGeneration": _QWEN_VL,
}
"""Architecture → the class to use in place of SGLang's, as ``module:name``."""


def for_architectures(upstream: type | None, architectures: Iterable[str]) -> type | None:
    """The processor class of a model.

    Args:
        upstream: the class that SGLang would take.
        architectures: of the model's configuration.

    Returns:
        This plugin's class, or ``upstream`` where the plugin has none.
    """
    for name in architectures:
        if name in _PROCESSORS:
            processor: Any = pkgutil.resolve_name(_PROCESSORS[name])
            return processor
    return upstream


def check_launch(hf_config: Any, video_config: Mapping[str, Any]) -> None:
    """Refuse video settings of a server before it starts, as far as the processor can tell.

    Args:
        hf_config: of the model.
        video_config: the ``video`` section of SGLang's ``--mm-process-config``.

    Raises:
        UnsupportedError: an unknown name, or a bad value.
    """
    processor: Any = for_architectures(None, hf_config.architectures or ())
    if processor is None:
        return
    try:
        processor.check_launch(hf_config, video_config)
    except ValueError as error:
        raise UnsupportedError(f"--mm-process-config: {error}") from None
