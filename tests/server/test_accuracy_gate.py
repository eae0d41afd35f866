"""The accuracy gate on a real server: green for PEVLM, red for a deliberately wrong mask."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from accuracy.edges import LAST, LATE_CODE, SECOND
from accuracy.server_gate import (
    FULL,
    MODEL,
    NATURAL,
    PEVLM,
    SERVER_FLAGS,
    Comparison,
    Item,
    answers,
    items,
)

from pevlm_sglang.tune.client import Client
from support.broken_masks import BREAKAGES, MARK, plugin_path
from support.server import Server

pytestmark = pytest.mark.server
FEW = 12  # natural videos are enough to see that a mask is broken


@dataclass(frozen=True)
class Asked:
    """A server that can break its mask, and its answers under full attention."""

    client: Client
    items: list[Item]
    full: list[bool]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    work = tmp_path_factory.mktemp("gate")
    path = f"{plugin_path(work)}:{os.environ.get('PYTHONPATH', '')}"
    flags = ("--attention-backend", "pevlm", *SERVER_FLAGS)
    with Server(MODEL, *flags, env={"PYTHONPATH": path}) as server:
        client = Client(server.url)
        questions = items(work)
        full = answers(client, questions, FULL)
        assert client.counters().pairs_saved == 0
        yield Asked(client, questions, full)


def test_green(asked: Asked) -> None:
    pevlm = answers(asked.client, asked.items, PEVLM)
    compared = Comparison(asked.items, asked.full, pevlm)
    assert asked.client.counters().pairs_saved > 0
    print(compared.table(), file=sys.stderr)
    assert not compared.failures(), compared.table()


@pytest.mark.parametrize(
    ("breakage", "caught_by"),
    [
        ("a step late", SECOND),
        ("a step early", LAST),
        ("without sink", LATE_CODE),
        ("positions reused", "time"),
    ],
)
def test_red(asked: Asked, breakage: str, caught_by: str) -> None:
    few = [i for i, item in enumerate(asked.items) if not FEW <= item.video < NATURAL]
    items = [asked.items[i] for i in few]
    broken = answers(asked.client, items, PEVLM, namespace=MARK + breakage)
    compared = Comparison(items, [asked.full[i] for i in few], broken)
    failures = compared.failures()
    print(breakage, compared.table(), file=sys.stderr, sep="\n")
    assert any(line.startswith(caught_by) for line in failures), (
        f"{breakage}: expected a loss of {caught_by}, got\n{compared.table()}"
    )


def test_every_breakage_is_tried() -> None:
    [parameters] = test_red.pytestmark  # type: ignore[attr-defined]
    assert {breakage for breakage, _ in parameters.args[1]} == {*BREAKAGES}
