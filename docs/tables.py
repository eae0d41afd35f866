"""The tables of the documentation that are made from the code.

``python docs/tables.py README.md docs/*.md`` writes each between its two markers, an
HTML comment ``NAME: begin`` and one ``NAME: end``; a test keeps them true.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pevlm_sglang import seams
from pevlm_sglang.families.family import Family
from pevlm_sglang.families.refused import REASONS
from pevlm_sglang.families.registry import FAMILIES
from pevlm_sglang.settings.refusals import REFUSALS, SWITCHES


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    lines = (header, ("---",) * len(header), *map(tuple, rows))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _value(value: object) -> str:
    return {False: "off", None: "not given"}.get(value) or f"`{value}`"  # type: ignore[call-overload]


def support() -> str:
    """The models, from the registry."""

    def rows(family: Family) -> Iterator[tuple[str, ...]]:
        for architecture, checkpoints in family.checkpoints.items():
            settings, wishes = family.names()
            yield (
                f"`{architecture}`",
                checkpoints,
                family.sent_by,
                _code(settings),
                _code(wishes),
            )

    header = ("architecture", "checkpoints", "video sent by", "of the server", "of a request")
    return _table(header, (row for family in FAMILIES for row in rows(family)))


def refused_options() -> str:
    """SGLang's options that are refused at start."""
    return _table(
        ("option", "expected", "because"),
        (
            (f"`{refusal.flag}`", ", ".join(map(_value, refusal.unless)), refusal.reason)
            for refusal in REFUSALS
        ),
    )


def refused_switches() -> str:
    """SGLang's environment variables that are refused at start."""
    return _table(
        ("variable", "expected", "because"),
        (
            (f"`{switch.name}`", ", ".join(map(_value, switch.unless)), switch.reason)
            for switch in SWITCHES
        ),
    )


def refused_models() -> str:
    """Architectures that are refused by name."""
    reasons = sorted(set(REASONS.values()))
    return _table(
        ("reason", "architectures"),
        (
            (reason, _code(name for name in REASONS if REASONS[name] == reason))
            for reason in reasons
        ),
    )


def versions() -> str:
    """Releases of SGLang."""
    oldest, newest = (".".join(map(str, v)) for v in (seams.OLDEST, seams.NEWEST_TESTED))
    return _table(
        ("SGLang", ""),
        (
            (newest, "tested, every seam and every server test"),
            (
                f"{oldest} up to it",
                "expected to work, not tested: its sources have the same seams, but for data "
                "parallelism, which is refused before 0.5.23",
            ),
            ("newer, below 0.6", "starts with a warning; a seam that has moved stops the server"),
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    "support table": support,
    "refused options": refused_options,
    "refused switches": refused_switches,
    "refused models": refused_models,
    "versions": versions,
}
"""By the name in the markers."""


def filled(text: str) -> str:
    """A document with its tables as the code has them."""
    for name, table in TABLES.items():
        begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
        before, found, rest = text.partition(f"{begin}\n")
        if found:
            text = f"{before}{found}{table()}{rest[rest.index(end) :]}"
    return text


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(filled(path.read_text()))
