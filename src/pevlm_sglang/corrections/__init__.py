"""SGLang's models, corrected: one subclass a model, in its place on a server with PEVLM."""

from __future__ import annotations

import pkgutil
from typing import Any

from pevlm_sglang.settings.refusals import UnsupportedError

_MODELS = {"LlavaQwenForCausalLM": "pevlm_sglang.families.llava_video.model:LlavaQwenForCausalLM"}
"""Architecture → the class to use in place of SGLang's, as ``module:name``."""


def corrected(architecture: str) -> bool:
    """Whether this plugin has a class of its own for an architecture."""
    return architecture in _MODELS


def for_architecture(upstream: type, architecture: str) -> type:
    """The model class of an architecture: this plugin's, or ``upstream`` where it has none."""
    if not corrected(architecture):
        return upstream
    model: Any = pkgutil.resolve_name(_MODELS[architecture])
    if not issubclass(model, upstream):
        raise UnsupportedError(
            f"{architecture}: expected SGLang's own model, got {upstream.__module__}."
            f"{upstream.__name__}; leave out what put it there, or serve with "
            "--pevlm-vision-fixes false"
        )
    return model


def described(model: Any) -> tuple[str, ...]:
    """What a model computes otherwise than SGLang's own, in words."""
    return tuple(getattr(model, "pevlm_corrections", ()))
