"""SGLang's functions that PEVLM hooks or wraps: found, checked by signature, and wrapped once."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from pevlm_sglang.errors import UnsupportedError

OLDEST, NEWEST_TESTED = (0, 5, 21), (0, 5, 23)
"""Releases of SGLang: the oldest with all seams, and the newest that the tests ran against."""

REMEDY = "install sglang>=0.5.21,<0.6 (tested up to 0.5.23) or a newer pevlm-sglang"

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def problem(target: str, parameters: Iterable[str], *, exact: bool = False) -> str | None:
    """What keeps a function of SGLang from being hooked; None where nothing does.

    Args:
        target: dotted path of the function.
        parameters: that the hook relies on, by name.
        exact: whether it can pass on no others.
    """
    owner, name = target.rsplit(".", 1)
    try:
        function = getattr(pkgutil.resolve_name(owner), name)
    except (ImportError, AttributeError):
        return f"no {target}"
    known = inspect.signature(function).parameters
    missing = [parameter for parameter in parameters if parameter not in known]
    if missing:
        return f"no {', '.join(missing)} in {target}({', '.join(known)})"
    if exact and (others := [name for name in known if name not in (*parameters, "self")]):
        return f"unknown {', '.join(others)} in {target}({', '.join(known)})"
    return None


def passes_on(function: Callable[..., Any]) -> bool:
    """Whether a function takes arguments that it does not name."""
    return any(p.kind in _OPEN for p in inspect.signature(function).parameters.values())


def wrap(
    owner: Any,
    name: str,
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    parameters: Iterable[str] | None = None,
) -> None:
    """Replace ``owner.name`` by ``wrapper(owner.name)``, unless that is done already.

    Args:
        owner: a module or class of SGLang.
        parameters: that the wrapper relies on, by name; all of them, if it passes on no others.
            Those that it names, if None.

    Raises:
        UnsupportedError: this SGLang lacks the function or one of the parameters, or has one that
            the wrapper does not know.
    """
    original = getattr(owner, name, None)
    if hasattr(original, "pevlm_original"):
        return
    prefix = "" if inspect.ismodule(owner) else f"{owner.__module__}."
    target = f"{prefix}{owner.__name__}.{name}"
    if original is None:
        raise UnsupportedError(f"this SGLang has no {target}; {REMEDY}")
    replacement = wrapper(original)
    if parameters is None:
        named = inspect.signature(replacement).parameters.values()
        parameters = [parameter.name for parameter in named if parameter.kind not in _OPEN]
    if found := problem(target, parameters, exact=not passes_on(replacement)):
        raise UnsupportedError(f"this SGLang has {found}; {REMEDY}")
    wrapped = functools.wraps(original)(replacement)
    wrapped.pevlm_original = original  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def untested_version(version: str) -> str | None:
    """A warning about a release of SGLang that is newer than the tested ones; else None."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if numbers <= NEWEST_TESTED:
        return None
    tested = ".".join(map(str, NEWEST_TESTED))
    return (
        f"SGLang {version} is newer than {tested}, the newest that this pevlm-sglang was tested "
        "with; its seams have the expected signatures"
    )
