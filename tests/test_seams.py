"""SGLang's functions: found, checked by signature, wrapped once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pevlm_sglang import plugin, seams
from pevlm_sglang.errors import UnsupportedError


class Owner:
    """Stands in for a class of SGLang."""

    def method(self, x: int, y: int = 0) -> int:
        return x + y


PLACE = f"{__name__}.Owner.method"


def plus_one(method: Callable[..., int]) -> Callable[..., int]:
    return lambda self, x, y=0: method(self, x, y) + 1


def passing(method: Callable[..., int]) -> Callable[..., int]:
    return lambda self, *args, **kwargs: method(self, *args, **kwargs) + 1


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> type[Owner]:
    monkeypatch.setattr(Owner, "method", Owner.method)  # restored afterwards
    monkeypatch.setattr(seams.pkgutil, "resolve_name", lambda _: Owner)
    return Owner


@pytest.mark.parametrize("wrapper", [plus_one, passing])
def test_wrapped_once(owner: type[Owner], wrapper: Any) -> None:
    for _ in range(2):
        seams.wrap(owner, "method", wrapper, parameters=("x", "y"))
    assert owner().method(1, y=2) == 4


def test_missing_function_is_refused(owner: type[Owner]) -> None:
    with pytest.raises(UnsupportedError, match=r"this SGLang has no .*Owner\.other; install "):
        seams.wrap(owner, "other", plus_one, parameters=())


def test_missing_parameter_is_refused(owner: type[Owner]) -> None:
    with pytest.raises(UnsupportedError, match=r"no z in .*method\(self, x, y\); install sglang"):
        seams.wrap(owner, "method", passing, parameters=("x", "z"))


def test_new_parameter_is_refused_by_a_wrapper_that_cannot_pass_it_on(owner: type[Owner]) -> None:
    """It would fail in the forward, which ends the scheduler."""
    with pytest.raises(UnsupportedError, match=r"unknown y in .*method\(self, x, y\)"):
        seams.wrap(owner, "method", plus_one, parameters=("x",))
    seams.wrap(owner, "method", passing, parameters=("x",))
    assert owner().method(1) == 2


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        *(("0.5.21", False), ("0.5.23", False), ("0.5.23.post1", False)),
        *(("0.5.24", True), ("0.6.0rc1", True), ("1.0", True)),
    ],
)
def test_warning_about_an_untested_release(version: str, warned: bool) -> None:
    warning = seams.untested_version(version)
    assert (warning is not None) == warned
    assert warning is None or f"SGLang {version} is newer than 0.5.23" in warning


@pytest.mark.parametrize("target", plugin._HOOKS)
def test_hooks_fit_this_sglang(target: str) -> None:
    pytest.importorskip("sglang")
    hook = plugin._HOOKS[target]
    exact = not seams.passes_on(hook.function)
    assert seams.problem(target, hook.parameters, exact=exact) is None


@pytest.mark.parametrize("target", plugin._HOOKS)
def test_a_hook_whose_function_changed_is_not_offered(
    target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is registered, and one line says what and how to mend it."""
    registry = pytest.importorskip("sglang.srt.plugins.hook_registry").HookRegistry
    monkeypatch.setattr(registry, "register", lambda *args, **kwargs: pytest.fail("registered"))
    changed = plugin._HOOKS[target]._replace(parameters=("no_such_parameter",))
    monkeypatch.setattr(plugin, "_HOOKS", {**plugin._HOOKS, target: changed})
    plugin.register()
    [record] = caplog.records
    assert f"this SGLang has no no_such_parameter in {target}(" in record.getMessage()
    assert "install sglang>=0.5.21,<0.6" in record.getMessage()
