"""Who may import whom: the directions of the house, and no circle. Read from the sources, imports
inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pevlm_kernels
import pevlm_sglang

ROOTS = {
    "pevlm_sglang": Path(pevlm_sglang.__file__).parent,
    "pevlm_kernels": Path(pevlm_kernels.__file__).parent,
}


def modules() -> dict[str, Path]:
    """Dotted name → source, of every module of the two packages."""
    found = {}
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """The modules that a module imports, wherever in its source, but for types alone."""
    tree = ast.parse(MODULES[name].read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


GRAPH = {name: {other for other in imported(name) if other in MODULES} for name in MODULES}


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


_SHELVES = (
    *("spans", "sizes", "family", "frame_counts", "tile_layout"),
    *("processor", "placeholder_processor"),
)
SHELVES = {f"pevlm_sglang.families.{name}" for name in _SHELVES}
COMMON = {"pevlm_sglang.layout", "pevlm_sglang.errors"}
CONFIG = {"pevlm_sglang.settings.config"}
MEDIA = {name for name in MODULES if name.startswith("pevlm_sglang.media.")}
FAMILIES = sorted(
    name for name, path in MODULES.items()
    if name.startswith("pevlm_sglang.families.") and path.name == "__init__.py"
)  # fmt: skip


def own(name: str) -> set[str]:
    return {other for other in GRAPH[name] if other.startswith("pevlm_")}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("pevlm_sglang.layout", set()),
        ("pevlm_sglang.errors", set()),
        ("pevlm_sglang.families.spans", COMMON),
        ("pevlm_sglang.families.sizes", COMMON),
        ("pevlm_sglang.families.frame_counts", COMMON | SHELVES),
        ("pevlm_sglang.families.family", COMMON | SHELVES),
        ("pevlm_sglang.families.tile_layout", COMMON),
        ("pevlm_sglang.families.placeholder_processor", COMMON | SHELVES | MEDIA),
        ("pevlm_sglang.families.processor", COMMON | SHELVES | MEDIA | CONFIG),
        ("pevlm_sglang.attention.plan", {"pevlm_sglang.layout", "pevlm_kernels.types"}),
    ],
)
def test_directions(name: str, allowed: set[str]) -> None:
    assert own(name) <= allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_knows_the_shelves_and_media_alone(family: str) -> None:
    """Never another family, and never the registry."""
    for name in MODULES:
        if name == family or name.startswith(f"{family}."):
            strangers = {
                other
                for other in own(name) - COMMON - SHELVES - {"pevlm_sglang.seams"}
                if not other.startswith((f"{family}.", "pevlm_sglang.media."))
            }
            assert strangers <= {family}, name


def test_the_registry_is_for_the_plugin_and_the_tools() -> None:
    users = {name for name in MODULES if "pevlm_sglang.families.registry" in GRAPH[name]}
    assert users
    assert all(name.startswith(("pevlm_sglang.plugin", "pevlm_sglang.tools.")) for name in users)


def test_kernels_know_nothing_of_the_plugin() -> None:
    for name in MODULES:
        if name.startswith("pevlm_kernels"):
            roots = {other.split(".")[0] for other in imported(name)}
            assert not roots & {"pevlm_sglang", "sglang"}, name


def test_only_the_seam_imports_sglang() -> None:
    """The idea, the settings and the shelves are read without SGLang; what needs it says so."""
    free = {"layout", "errors", "settings.config", "families.spans", "families.sizes"}
    free |= {"families.frame_counts", "attention.plan", "observe.observer", "tools.show"}
    for name in free:
        tree = ast.parse(MODULES[f"pevlm_sglang.{name}"].read_text())
        named = {
            node.module.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module
        }
        assert "sglang" not in named, name
