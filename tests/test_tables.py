"""The tables of the documentation are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_is_up_to_date(document: Path) -> None:
    text = document.read_text()
    assert tables.filled(text) == text, "run: python docs/tables.py README.md docs/*.md"


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_stands_in_a_document(name: str) -> None:
    """With its content, so that the check above cannot pass over it."""
    holders = [
        document for document in DOCUMENTS if f"<!-- {name}: begin -->" in document.read_text()
    ]
    assert holders
    assert all(tables.TABLES[name]() in document.read_text() for document in holders)


def test_a_change_is_noticed() -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.filled(text.replace("LongVILA-7B-256f", "LongVILA-1M")) == text
