"""What is searched for or imported by name."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pevlm_kernels import bound, choice, flash
from support.emulated_kernels import FLASH


@contextmanager
def recorded_lookups() -> Iterator[list[str]]:
    """Records them inside, but PyTorch's own. All libraries are found, FlashAttention's modules are
    the emulated ones, and nothing is known yet."""
    found: list[str] = []
    cached = (choice.is_installed, choice.module_of, bound, flash._load)

    def record(of: Any, name: str, original: Callable) -> None:
        def recorder(module: str, *args: Any, **kwargs: Any) -> Any:
            if not module.startswith("torch"):
                found.append(f"{name} {module}")
            return original(module, *args, **kwargs)

        patch.setattr(of, name, recorder)

    with pytest.MonkeyPatch.context() as patch:
        for module, emulated in FLASH.items():
            patch.setitem(sys.modules, module, emulated)
        for function in cached:
            function.cache_clear()
        record(choice, "find_spec", lambda name: name)
        record(importlib, "import_module", importlib.import_module)
        record(builtins, "__import__", builtins.__import__)
        yield found
    for function in cached:
        function.cache_clear()
