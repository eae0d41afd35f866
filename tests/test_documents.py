"""The documents speak of what is there: linked files, commands, flags, variables, refusals."""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pevlm_sglang.media.stages import SCHEDULER, STAGES
from pevlm_sglang.observe.observer import DENSE_REASONS
from pevlm_sglang.settings import flags
from pevlm_sglang.settings.config import PREFILL_KERNELS, PevlmConfig
from support import documents
from support.documents import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "docs/*.md")
DOCUMENTS = documents.files(
    *PAGES, "CHANGELOG.md", "benchmarks/**/README.md", "benchmarks/accuracy/results/tables.md"
)
README_BYTES = 9_000
PICTURE_BYTES = 150_000
_CLI = "import sys; from pevlm_sglang.tools.cli import main; sys.exit(main())"
_PYTHON = r"(?:\.\S+/)?python[\d.]*"


@cache
def _text(path: str) -> str:
    return (ROOT / path).read_text()


def _pages() -> list[str]:
    return documents.files(*PAGES)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_in_git(document: str) -> None:
    tracked = documents.files()
    folders = {str(parent) for name in tracked for parent in Path(name).parents}
    broken = []
    for link in documents.links(_text(document)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        name = str(target.resolve().relative_to(ROOT))
        there = name in tracked or name in folders
        if not there or (anchor and anchor not in documents.anchors(_text(name))):
            broken.append(link)
    assert not broken


def test_a_link_to_an_ignored_file_is_seen() -> None:
    text = "![a](ignored.png) [b](x.md#y)\n```\n[c](not/a/link)\n```\n"
    assert documents.links(text) == ["ignored.png", "x.md#y"]
    assert documents.anchors("## The *right* video: `x`\n") == {"the-right-video-x"}


def test_readme_is_a_door() -> None:
    assert len(_text("README.md").encode()) <= README_BYTES


def test_pictures_are_small() -> None:
    large = [p for p in documents.files("*.png") if (ROOT / p).stat().st_size > PICTURE_BYTES]
    assert not large


def test_environment_variables_are_documented() -> None:
    read: dict[str, str] = {}
    for path in documents.files("src", "kernels", "tests", "benchmarks", "docs", ".ci", "Makefile"):
        if path.endswith(".py"):
            found = documents.python_variables(_text(path))
        elif path.endswith(".sh") or path.startswith(".ci/") or path == "Makefile":
            found = documents.shell_variables(_text(path)) - {"BIN", "INSTALLED"}
        else:
            continue
        read |= dict.fromkeys(found, path)
    read |= dict.fromkeys(re.findall(r"!ENV \[(\w+)", _text("mkdocs.yml")), "mkdocs.yml")
    rows = documents.table(_text("CONTRIBUTING.md"), "## Environment variables")
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert {n: read[n] for n in read.keys() - documented} == {}
    assert documented - read.keys() == set()


def test_a_variable_is_found_however_it_is_read() -> None:
    source = """
NAME = "BY_CONSTANT"
os.environ.get(NAME); os.environ["BY_INDEX"]; "BY_IN" in os.environ; os.getenv("BY_GETENV")
envs.BY_SGLANG.get(); os.environ["WRITTEN"] = 1
def _read(name): return os.environ.get(name)
_read("BY_PARAMETER")
"""
    names = {"BY_CONSTANT", "BY_INDEX", "BY_IN", "BY_GETENV", "BY_SGLANG", "BY_PARAMETER"}
    assert documents.python_variables(source) == names
    with pytest.raises(ValueError, match="expected a constant name, got unknown"):
        documents.python_variables("os.environ[unknown]")
    shell = 'A=1\n# $COMMENT\n"$A" "${WITH_DEFAULT:-x}" "$PLAIN" $PWD\n'
    assert documents.shell_variables(shell) == {"WITH_DEFAULT", "PLAIN"}


def test_markers_are_documented() -> None:
    settings = tomllib.loads(_text("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    markers = [marker.partition(":") for marker in settings["markers"]]
    rows = documents.table(_text("CONTRIBUTING.md"), "## Test markers")
    assert [[f"`{name}`", meaning.strip()] for name, _, meaning in markers] == rows


def test_make_targets_are_documented() -> None:
    targets = set(re.search(r"^\.PHONY: (.*)$", _text("Makefile"), re.MULTILINE)[1].split())
    rows = documents.table(_text("CONTRIBUTING.md"), "## Make targets")
    assert {row[0].strip("`").removeprefix("make ") for row in rows} == targets
    for page in _pages():
        for line in documents.code(_text(page), "bash"):
            if match := re.match(r"make ([a-z]+)", line):
                assert match[1] in targets, f"{page}: {line}"


def test_python_files_of_commands_are_in_git() -> None:
    tracked = documents.files()
    for document in DOCUMENTS:
        for line in documents.code(_text(document), "bash", ""):
            if match := re.search(rf"{_PYTHON} (\w\S*\.py)\b", line):
                assert match[1] in tracked, f"{document}: {line}"


@cache
def _options(*command: str) -> set[str]:
    """Flags in the help of a command of ``pevlm``; of none, its commands."""
    done = subprocess.run(
        [sys.executable, "-c", _CLI, *command, "--help"],
        check=True,
        capture_output=True,
        text=True,
    )
    pattern = r"^\s+(?:-h, )?(--[a-z-]+)" if command else r"^    ([a-z]+) "
    return set(re.findall(pattern, done.stdout, re.MULTILINE))


def test_commands_of_pevlm_exist() -> None:
    seen = set()
    for page in _pages():
        for line in documents.code(_text(page), "bash"):
            if match := re.match(r"(?:\S+/)?pevlm ([a-z]+)(.*)", line):
                command, rest = match.groups()
                assert command in _options(), f"{page}: {line}"
                unknown = set(re.findall(r"--[a-z-]+", rest.partition("#")[0])) - _options(command)
                assert not unknown, f"{page}: {line}"
                seen.add(command)
    assert seen == {"show", "tune"}


def test_flags_exist() -> None:
    """SGLang's, PEVLM's, those of ``pevlm`` and of the benchmarks."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(conflict_handler="resolve")
    ServerArgs.add_cli_args(parser)
    flags.add_flags(parser)
    known = set(parser._option_string_actions) | _options("show") | _options("tune")
    for path in documents.files("benchmarks"):
        if path.endswith((".py", ".sh")):
            known |= set(re.findall(r"--[a-z][a-z-]+", _text(path)))
    for page in _pages():
        for line in documents.code(_text(page), "bash"):
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*[a-z](?![\w…-])", line)) - known
            assert not unknown, f"{page}: {line}"


def test_options_stand_in_serving_with_their_defaults() -> None:
    rows = documents.table(_text("docs/serving.md"), "## Launch")
    documented = {row[0].strip("`").split()[0]: row for row in rows}
    assert documented.pop("--pevlm-config")
    shown: dict[Any, str] = {True: "true", False: "off"}
    for option in dataclasses.fields(PevlmConfig):
        row = documented.pop(f"--pevlm-{option.name.replace('_', '-')}")
        assert row[1].strip("`") == shown.get(option.default, str(option.default))
        for choice in option.metadata["choices"] or ():
            assert f"`{choice}`" in " ".join(row), row
    assert not documented
    kernels = next(row for row in rows if "prefill-kernel" in row[0])
    assert set(re.findall(r"`(\w+)`", " ".join(kernels[1:]))) == set(PREFILL_KERNELS)


def test_reasons_and_stages_are_documented() -> None:
    page = _text("docs/operations.md")
    reasons = re.search(r"has one of these reasons:\n\n(.*?)\n\n", page, re.DOTALL)[1]
    assert dict(re.findall(r"\| `(\w+)` \| (.*) \|", reasons)) == DENSE_REASONS
    stages = page.split("| stage | |")[1].split("\n\n")[0]
    assert dict(re.findall(r"\| `(\w+)` \| (.*) \|", stages)) == {**STAGES, **SCHEDULER}


def test_messages_of_the_troubleshooting_table_exist() -> None:
    import sglang.srt.utils.common as of_sglang

    paths = [ROOT / path for path in documents.files("src") if path.endswith(".py")]
    paths += [Path(of_sglang.__file__), Path(argparse.__file__)]
    shown = "\n".join(documents.messages(path.read_text()) for path in paths)
    shown = shown.replace("PEVLM: ", "") + "\nFailed to apply hooks\ninvalid choice: 'pevlm'"
    heading = "## Troubleshooting by error message"
    for message, _remedy in documents.table(_text("docs/operations.md"), heading):
        for quoted in re.findall(r"`([^`]+)`", message):
            pattern = "[^\n]*?".join(map(re.escape, quoted.split("…")))
            assert re.search(pattern, shown), quoted


def test_the_walk_names_each_file_once() -> None:
    page = _text("docs/how-it-works.md")
    walk = page[page.index("## From a flag") : page.index("## What keeps it true")]
    named = [link.removeprefix("../") for link in documents.links(walk)]
    named = [name for name in named if name.startswith(("src/", "kernels/"))]
    assert sorted(named) == sorted(set(named))
    modules = {
        path
        for path in documents.files("src", "kernels")
        if path.endswith(".py") and _text(path).strip() and "/tune/" not in path
    }
    packages = {path for path in modules if path.endswith("__init__.py")}
    assert modules - packages - set(named) == set()
