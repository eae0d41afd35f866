"""What the documents say, and what of the repository they speak of, for tests of the documents."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r'\]\(([^)\s]+)\)|<img src="([^"]+)"')
_SHELL_DEFAULT = re.compile(r"\$\{([A-Z][A-Z0-9_]*):?[-+]")
_SHELL_PLAIN = re.compile(r"\$[{(]?([A-Z][A-Z0-9_]*)")
_SHELL_SET = re.compile(r"\b([A-Z][A-Z0-9_]*)\s*[:?]?=")
_ENVIRONMENT = ("os.environ", "environ")
_SHELL_OWN = {"PWD", "SECONDS"}


def files(*patterns: str) -> list[str]:
    """Paths in git that match the patterns, all without one."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *patterns]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [name for name in found.split("\0") if name]


def links(text: str) -> list[str]:
    """Targets of links and pictures, outside of code."""
    prose = _CODE.sub("`code`", _FENCE.sub("", text))
    return [link or picture for link, picture in _LINK.findall(prose)]


def anchors(text: str) -> set[str]:
    """What ``#…`` may name in a document: its headings, as MkDocs and GitHub spell them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def code(text: str, *languages: str) -> list[str]:
    """Inline code, and lines of fenced code in these languages; joined where a line goes on."""
    inline = _CODE.findall(_FENCE.sub("", text))
    fenced = [body for language, body in _FENCE.findall(text) if language in languages]
    joined = (body.replace("\\\n", " ") for body in fenced)
    return inline + [line for body in joined for line in body.splitlines()]


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head.

    Raises:
        ValueError: no such heading, or no table there.
    """
    _, found, below = text.partition(f"\n{heading}\n")
    rows = re.search(r"^\|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", below, re.MULTILINE)
    if not found or rows is None:
        raise ValueError(f"{heading!r}: expected a heading with a table, got none")
    return [
        [cell.strip() for cell in row.strip("|").split(" |")] for row in rows[1].splitlines() if row
    ]


def python_variables(source: str) -> set[str]:
    """Environment variables that Python source reads, by ``os.environ``, ``os.getenv`` or SGLang's
    ``envs``.

    Raises:
        ValueError: a name that is no constant, nor passed to the function that reads it as one.
    """
    tree = ast.parse(source)
    return {name for node, spelled in _reads(tree) for name in _names(tree, node, spelled)}


def _reads(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Each read, with the expression of its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "envs":
            yield node, ast.Constant(node.attr)
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func)
            if re.fullmatch(r"(os\.)?(environ\.(get|setdefault|pop)|getenv)", function):
                yield node, node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in _ENVIRONMENT:
            if isinstance(node.ctx, ast.Load):
                yield node, node.slice
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) in _ENVIRONMENT:
            yield node, node.left


def _names(tree: ast.Module, read: ast.AST, name: ast.expr) -> Iterator[str]:
    if isinstance(name, ast.Constant):
        yield str(name.value)
        return
    spelled = ast.unparse(name)
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and spelled in map(ast.unparse, node.targets):
            found.append(node.value)
        elif isinstance(node, ast.FunctionDef) and read in ast.walk(node):
            parameters = [argument.arg for argument in node.args.args]
            if spelled in parameters:
                at = parameters.index(spelled)
                found += [
                    call.args[at]
                    for call in ast.walk(tree)
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == node.name
                ]
    constants = [str(value.value) for value in found if isinstance(value, ast.Constant)]
    if not constants or len(constants) < len(found):
        raise ValueError(f"os.environ: expected a constant name, got {spelled}")
    yield from constants


def shell_variables(source: str) -> set[str]:
    """Environment variables that a script of bash or make reads."""
    text = re.sub(r"^\s*#.*$", "", source, flags=re.MULTILINE)
    plain = set(_SHELL_PLAIN.findall(text)) - set(_SHELL_SET.findall(text)) - _SHELL_OWN
    from_outside = re.findall(r"^([A-Z]+) \?=", text, re.MULTILINE)
    return plain | set(_SHELL_DEFAULT.findall(text)) | set(from_outside)


def messages(source: str) -> str:
    """All text that Python source may show, with ``…`` for what is filled in."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
            texts.append("".join(str(part) for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return "\n".join(texts)
