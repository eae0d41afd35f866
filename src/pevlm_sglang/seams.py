"""Put a wrapper around a function of SGLang, once, or refuse the server."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from pevlm_sglang.settings.refusals import UnsupportedError


def wrap(
    owner: Any,
    name: str,
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    parameters: Iterable[str] = (),
) -> None:
    """Replace ``owner.name`` by ``wrapper(owner.name)``, unless that is done already.

    Args:
        owner: a module or class of SGLang.
        parameters: that the wrapper relies on, by name.

    Raises:
        UnsupportedError: this SGLang lacks the function, or one of the parameters.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise UnsupportedError(_missing(f"{owner.__name__}.{name}"))
    if hasattr(original, "pevlm_original"):
        return
    for parameter in parameters:
        if parameter not in inspect.signature(original).parameters:
            raise UnsupportedError(_missing(f"'{parameter}' in {owner.__name__}.{name}"))
    wrapped = functools.wraps(original)(wrapper(original))
    wrapped.pevlm_original = original  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _missing(what: str) -> str:
    return (
        f"this SGLang has no {what}, which the vision corrections need; install sglang>=0.5.21 "
        "(developed on 0.5.23), or serve with --pevlm-vision-fixes false"
    )
