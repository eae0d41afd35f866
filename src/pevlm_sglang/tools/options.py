"""The options of ``pevlm``'s commands: a row each, and what a value may be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from pevlm_sglang.settings.config import flag

Row = tuple[str, Callable[[str], Any], str, Any, str]
"""Name, type, metavar, default and help. Defaults: None and REQUIRED, which the help does not show;
False for a flag without a value; a tuple for one value or more."""

REQUIRED = object()


def add_command(commands: Any, name: str, run: Any, summary: str, **texts: str) -> Any:
    """Add a subcommand of ``pevlm`` with its description and epilog, and return its parser."""
    form = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=summary, formatter_class=form, **texts)
    parser.set_defaults(run=run)
    return parser


def add_options(parser: Any, *rows: Row) -> None:
    """Add ``--name`` for each row; its help ends with the default."""
    for name, kind, metavar, default, text in rows:
        form: dict[str, Any] = {"type": kind, "metavar": metavar}
        if default is REQUIRED:
            form["required"] = True
        elif default is False:
            form = {"action": "store_true"}
        elif isinstance(default, tuple):
            form |= {"default": default, "nargs": "+"}
            text += f" (default: {' '.join(map(str, default))})"
        elif default is not None:
            form["default"] = default
            text += f" (default: {default})"
        parser.add_argument(flag(name), help=text, **form)


def _number(kind: type, holds: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


seconds = _number(float, lambda value: 0 < value < math.inf, "a number of seconds above 0")
quantile = _number(float, lambda value: 0 < value <= 1, "a number above 0, up to 1")
count = _number(int, lambda value: value >= 1, "a whole number of 1 or more")
