"""Broken files through each family's processor: refused as the client's fault, or taken, in time
and in bounded memory.

``make fuzz`` tries ten thousand (``--fuzz-files``); a file that fails is named by its number, of
which ``support.mutations.mutated`` makes it again.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from support import fuzz_media, mutations
from support.families import internvl_model, llava_video_tiny, longvila
from support.fuzz_media import ANSWERED, FAMILIES, GOOD, REFUSED, Outcome, Worker
from support.tiny import make_tiny_model

pytestmark = pytest.mark.slow
CORPUS = Path(__file__).parents[1] / "corpus"
SHARES = {"qwen2_5_vl": 0.7, "internvl": 0.1, "llava_video": 0.1, "longvila": 0.1}
GROWTH = 64 << 20  # bytes of a worker's memory, from a quarter of its files to the end
MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": partial(make_tiny_model, num_layers=1, vision_depth=1),
    "internvl": internvl_model.make_tiny_model,
    "llava_video": llava_video_tiny.make_tiny_model,
    "longvila": longvila.make_tiny_model,
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("seeds")
    mutations.write_seeds(directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_files(
    family: str, seeds: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    sound = mutations.write_seeds(seeds)
    count = round(SHARES[family] * pytestconfig.getoption("--fuzz-files"))
    counts: Counter[tuple[str, str]] = Counter()
    failures: dict[int | str, Outcome] = {}
    resident: list[int] = []
    with Worker(family, MODELS[family](tmp_path / "model")) as process:
        for path in seeds.iterdir():
            assert process(path).kind == ANSWERED, path
        for path in sorted(CORPUS.iterdir()):
            if (outcome := process(path)).kind not in GOOD:
                failures[path.name] = outcome
        for number in range(count):
            kind, name, content = mutations.mutated(number, sound)
            path = tmp_path / f"broken{Path(name).suffix}"
            path.write_bytes(content)
            outcome = process(path)
            counts[kind, outcome.kind] += 1
            if outcome.kind in GOOD:
                resident.append(outcome.resident)
            else:
                failures[number] = outcome
    print(f"{family}: {count} files: {dict(counts)}", *failures.items(), sep="\n", file=sys.stderr)
    assert not failures
    assert {outcome for _, outcome in counts} == {ANSWERED, REFUSED}
    assert {kind for kind, _ in counts} == {*mutations.MUTATIONS}
    assert resident[-1] - max(resident[: len(resident) // 4]) <= GROWTH


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("while True: pass", fuzz_media.HANG),
        ("__import__('os').abort()", fuzz_media.DEATH),
        ("raise KeyError", fuzz_media.ERROR),
        ("b'x' * (3 << 29); raise ValueError", fuzz_media.GREEDY),
        ("bytearray(20 << 30)", fuzz_media.ERROR),  # more than the worker may have
    ],
)
def test_what_goes_wrong_is_seen(
    line: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if kind == fuzz_media.HANG:
        monkeypatch.setattr(fuzz_media, "TIME_LIMIT", 2.0)
    with Worker("faulty", tmp_path) as process:
        (tmp_path / "fault.py").write_text(line)
        assert process(tmp_path / "fault.py").kind == kind
        (tmp_path / "fault.py").write_text("raise ValueError")
        assert process(tmp_path / "fault.py").kind == REFUSED
