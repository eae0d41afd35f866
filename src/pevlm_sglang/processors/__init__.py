"""SGLang's multimodal processors, completed: one subclass a model family, beside its ``families``.

A processor turns a request's text and media into tokens and features. It runs in the launcher,
before the scheduler sees the request; a ``ValueError`` there is HTTP 400.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from typing import Any

_PROCESSORS: dict[str, str] = {
    "InternVLChatModel": "pevlm_sglang.processors.internvl:PevlmInternVLProcessor",
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
