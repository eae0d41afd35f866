"""The lists of named mutants fit the code; ``make mutants`` runs them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from support.mutants import DOCUMENT, ROOT, Mutant, mutants

MUTANTS = list(mutants())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.part}: {mutant.name}")
def test_a_mutant_fits_the_code(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, (
        "its old text is gone: write anew"
    )
    assert mutant.new != mutant.old
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text, test


def test_names_are_their_own() -> None:
    assert Counter((m.part, m.name) for m in MUTANTS).most_common(1)[0][1] == 1


def test_the_page_is_of_these_lists() -> None:
    """It is written by a whole run, in which none survived that should not."""
    rows = re.findall(r"^\| (\w+) \| (\d+) \|", DOCUMENT.read_text(), re.MULTILINE)
    listed = {part: int(number) for part, number in rows}
    assert listed == Counter(mutant.part for mutant in MUTANTS), "make mutants writes it"


def test_a_mutant_whose_text_is_gone_says_so(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("twice twice")
    for old in ("gone", "twice"):
        with pytest.raises(ValueError, match=r"expected its old text once in file\.py"):
            Mutant("part", "name", "file.py", old, "", ()).apply(tmp_path)
