"""The lists of named mutants fit the code; ``make mutants`` runs them."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from support.mutants import DOCUMENT, ROOT, Mutant, mutants, page, rows_of

MUTANTS = list(mutants())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.part}: {mutant.name}")
def test_a_mutant_fits_the_code(mutant: Mutant) -> None:
    code = (ROOT / mutant.file).read_text()
    assert code.count(mutant.old) == 1, "its old text is gone: write anew"
    assert mutant.new != mutant.old
    ast.parse(code.replace(mutant.old, mutant.new))  # red by its fault, and not by its spelling
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text, test


def test_names_are_their_own() -> None:
    assert Counter((m.part, m.name) for m in MUTANTS).most_common(1)[0][1] == 1


def test_the_page_is_of_these_lists() -> None:
    """Written by runs in which none survived that should not; a part never run is called so."""
    rows = rows_of(DOCUMENT.read_text())
    of_part = Counter(mutant.part for mutant in MUTANTS)
    to_kill = Counter(mutant.part for mutant in MUTANTS if not mutant.harmless)
    assert rows == {part: (of_part[part], to_kill[part]) for part in rows}, "make mutants"
    assert DOCUMENT.read_text() == page(rows, MUTANTS)


def test_a_mutant_whose_text_is_gone_says_so(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("twice twice")
    for old in ("gone", "twice"):
        with pytest.raises(ValueError, match=r"expected its old text once in file\.py"):
            Mutant("part", "name", "file.py", old, "", ()).apply(tmp_path)
