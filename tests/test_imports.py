"""Who imports whom: the layout and the kernels stand alone, each in a process of its own."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import pevlm_kernels
from pevlm_sglang.attention import plan

GPU_LIBRARIES = ("triton", "flash_attn", "flash_attn_interface", "flashinfer", "sgl_kernel")
KERNEL_MODULES = sorted(
    f"pevlm_kernels.{module.name}"
    for module in pkgutil.iter_modules(pevlm_kernels.__path__)
    if not module.name.startswith("triton_")  # a Triton kernel stands below `import triton`
)

CODE = """
import sys
before = set(sys.modules)  # what the interpreter's own start-up brings
for name in sys.argv[1:]:
    __import__(name)
print(*sorted(set(sys.modules) - before), sep="\\n")
"""


@cache
def packages_with(*modules: str) -> set[str]:
    """The top-level packages that importing these brings along, in a process of its own."""
    names = subprocess.run(
        [sys.executable, "-c", CODE, *modules], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(modules) <= set(names), "the process must have imported what it was asked to"
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        pytest.param(
            ("pevlm_sglang", "pevlm_sglang.layout"),
            ("torch", "numpy", "sglang", "pevlm_kernels", "yaml"),
            id="layout and public names",
        ),
        pytest.param(
            ("pevlm_sglang.settings.config",), ("torch", "sglang", "pevlm_kernels"), id="config"
        ),
        pytest.param(
            (
                "pevlm_sglang.families.spans",
                "pevlm_sglang.families",
                "pevlm_sglang.families.qwen_vl.spans",
            ),
            ("torch", "sglang", "transformers", "pevlm_kernels"),
            id="frames and families",
        ),
        pytest.param(
            ("pevlm_sglang.settings.flags", "pevlm_sglang.settings.refusals"),
            ("torch", "sglang", "prometheus_client"),
            id="arguments",
        ),
        pytest.param(
            (
                "pevlm_sglang.attention.plan",
                "pevlm_sglang.observe.observer",
                "pevlm_sglang.requests",
            ),
            ("sglang", "prometheus_client", *GPU_LIBRARIES),
            id="plan",
        ),
        pytest.param(
            ("pevlm_sglang.tools.cli",), ("torch", "sglang", "openai", "numpy", "tqdm"), id="cli"
        ),
        pytest.param(
            ("pevlm_sglang.tune.client",),
            ("torch", "sglang", "numpy", "pevlm_kernels"),
            id="client",
        ),
        # The entry point is loaded in every process of SGLang, before it sets the variables that
        # prometheus_client and CUDA read when they are imported.
        pytest.param(
            ("pevlm_sglang.plugin",), ("prometheus_client", "sglang", *GPU_LIBRARIES), id="plugin"
        ),
        pytest.param(
            ("pevlm_kernels", *KERNEL_MODULES),
            ("pevlm_sglang", "sglang", "transformers", *GPU_LIBRARIES),
            id="kernels",
        ),
    ],
)
def test_does_not_import(modules: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    assert not packages_with(*modules) & set(forbidden)


def test_layout_needs_the_standard_library_alone() -> None:
    assert packages_with("pevlm_sglang.layout") - sys.stdlib_module_names == {"pevlm_sglang"}


def test_yaml_is_the_only_package_that_config_may_need() -> None:
    packages = packages_with("pevlm_sglang.settings.config")
    assert packages - sys.stdlib_module_names <= {"pevlm_sglang", "yaml"}


def test_of_the_kernels_plan_needs_the_types_alone() -> None:
    """Read from its source: importing a module loads its package's door too."""
    tree = ast.parse(Path(plan.__file__).read_text())
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {name for name in named if name.startswith("pevlm")}
    assert own == {"pevlm_kernels.types", "pevlm_sglang.layout"}


def test_kernels_folder_is_no_package() -> None:
    """``kernels`` is the name of Hugging Face's package."""
    assert not (Path(pevlm_kernels.__file__).parents[1] / "__init__.py").exists()
