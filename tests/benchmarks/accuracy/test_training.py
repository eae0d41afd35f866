"""The training loop on a few steps of every kind: its phases, its checkpoint, what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import recipe, train, trainer
from accuracy.dataset import VALIDATION

FEW = (
    replace(recipe.PHASES[0], until=1, scenes=(4, 5)),
    replace(recipe.PHASES[2], first=4, until=5, scenes=(4, 5)),
    replace(recipe.PHASES[-1], first=5, until=7, scenes=(6, 7)),
)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PHASES", FEW)
    monkeypatch.setattr(train, "TOKENS", 1)
    monkeypatch.setattr(train, "QUESTIONS", 3)
    monkeypatch.setattr(train, "VARIANTS", 1)
    monkeypatch.setattr(train, "VALIDATION_VIDEOS", 2)
    monkeypatch.setattr(train, "VALIDATION_SCENES", (5,))
    monkeypatch.setattr(train, "MODEL", tmp_path / "model")
    monkeypatch.setattr(train, "RESULTS", tmp_path / "results")


def options(work: Path, *flags: str) -> train.argparse.Namespace:
    return train.parse(["--no-compile", "--work-dir", str(work), *flags])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    """Stopped after every step by a limit on its minutes, and gone on with from the checkpoint."""
    whole = train.Run(options(tmp_path / "whole"))
    whole.train()
    assert whole.step == 7
    for expected in (1, 5, 6, 7):  # steps 1 to 3 are in no phase
        part = train.Run(options(tmp_path / "parts", "--minutes", "0"))
        part.train()
        assert part.step == expected
    found, wanted = (run.trainer.model.state_dict() for run in (part, whole))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_what_it_writes_goes_on(tmp_path: Path) -> None:
    train.Run(options(tmp_path / "work")).train()
    written = json.loads((tmp_path / "results" / "training.json").read_text())
    assert written["steps"] == 7
    assert [entry["step"] for entry in written["curve"]] == [7]
    assert set(written["curve"][0]["accuracy"]) == {"10"}
    again = train.Run(options(tmp_path / "elsewhere", "--from-model"))
    assert again.step == 7
    assert recipe.phase_of(again.step) is None


def test_a_phase_trains_what_it_says(tmp_path: Path) -> None:
    """The tower stands still behind the first phase; the language model never does."""
    run = train.Run(options(tmp_path))
    snapshots = []
    for phase in FEW:
        if phase.frozen_vision and run.trainer.bank is None:
            run.trainer.freeze_vision(0, variants=1)
        run.step = phase.first
        before = {n: p.clone() for n, p in run.trainer.model.named_parameters()}
        run.do_step(phase)
        moved = {n for n, p in run.trainer.model.named_parameters() if not p.equal(before[n])}
        snapshots.append(
            (any(".visual." in n for n in moved), any("language_model" in n for n in moved))
        )
    assert snapshots == [(True, True), (False, True), (False, True)]


def test_validation_never_sees_training_videos(tmp_path: Path) -> None:
    seeds = []
    made = trainer.Trainer(tmp_path, seed=0, compiled=False)
    batch = made.batch
    made.batch = lambda seed, *rest: seeds.append(seed[0]) or batch(seed, *rest)  # type: ignore[method-assign, func-returns-value]
    made.evaluate(4, videos=2, questions=2)
    assert set(seeds) == {VALIDATION}
