"""Named mutants: faults that the tests must see, ``python -m support.mutants`` (``make mutants``).

An entry of ``tests/mutants/*.toml`` is a file, a text in it, what stands there instead, and the
tests that must go red. Each runs in a copy of the repository. A ``harmless`` one says why it
changes nothing that can be seen, and must survive.

"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
LISTS = ROOT / "tests" / "mutants"
DOCUMENT = ROOT / "docs" / "mutants.md"
OPTIONS = (
    *("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile", "fast"),
    *("--hypothesis-seed", "0"),  # a fault is seen every time, or never
)
GREEN, RED = 0, 1  # exit codes of pytest; any other means that no test has spoken
TIMED_OUT = -signal.SIGALRM  # one that runs for ever is seen


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        part: the list that it stands in.
        name: what is wrong, in words.
        file: from the repository's root.
        old, new: a text that occurs once in the file, and what takes its place.
        tests: of which one must go red at least; arguments of pytest.
        harmless: why none can; empty where one must.
    """

    part: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    harmless: str = ""

    def apply(self, root: Path) -> str:
        """Put the fault into a copy of the repository; returns the file's text of before."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.part}: {self.name}: expected its old text once in {self.file}, found it "
                f"{text.count(self.old)} times; write it anew, or delete it with what it tried"
            )
        path.write_text(text.replace(self.old, self.new))
        return text


def mutants() -> Iterator[Mutant]:
    """All of the lists."""
    for path in sorted(LISTS.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutant"]:
            yield Mutant(path.stem, **{**entry, "tests": tuple(entry["tests"])})


class Copy:
    """A copy of the repository, and a process that runs tests in it.

    Args:
        root: a folder to be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = copy_repository(root)
        folders = (root / "src", root / "kernels", root / "tests" / "cpu_platform")
        self._pytest = subprocess.Popen(
            [sys.executable, "-P", root / "tests" / "support" / "warm_pytest.py"],
            cwd=root,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, folders)),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run_tests(self, tests: Sequence[str]) -> int:
        """Exit code of pytest."""
        assert self._pytest.stdin is not None
        assert self._pytest.stdout is not None
        self._pytest.stdin.write(json.dumps([*OPTIONS, *tests]) + "\n")
        self._pytest.stdin.flush()
        for line in self._pytest.stdout:
            word, _, code = line.partition(" ")
            if word == "exit":
                return int(code)
        raise RuntimeError("expected an exit code of pytest, but its process has ended")

    def close(self) -> None:
        self._pytest.kill()
        self._pytest.wait()

    def try_out(self, mutant: Mutant) -> str:
        """``killed``, ``survived``, or why nothing is known."""
        before = mutant.apply(self.root)
        code = self.run_tests(mutant.tests)
        (self.root / mutant.file).write_text(before)
        words = {RED: "killed", TIMED_OUT: "killed", GREEN: "survived"}
        found = words.get(code, f"pytest ended with {code}")
        print(f"{found:9} {mutant.part}: {mutant.name}", flush=True)
        return found


def copy_repository(to: Path) -> Path:
    """What git tracks, or would."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():  # to a folder, say
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name, follow_symlinks=False)
    subprocess.run(["git", "init", "-q"], cwd=to, check=True)  # tests that ask git
    return to


def page(rows: dict[str, tuple[int, int]], listed: Sequence[Mutant]) -> str:
    """The document.

    Args:
        rows: part → its mutants, and how many of them were killed, of the parts that were run.
        listed: all mutants.
    """
    harmless = [mutant for mutant in listed if mutant.harmless]
    missing = sorted({mutant.part for mutant in listed} - rows.keys())
    total, killed = (sum(numbers) for numbers in zip(*rows.values(), strict=True))
    lines = [
        "# Mutants",
        "",
        "Faults that are put into the code one at a time; the tests that each names must see it.",
        "`make mutants` runs them all, `make mutants ARGS=layout:` those of a part; a part of",
        "which none survives that should not gets its row here. The lists are in `tests/mutants/`.",
        "",
        f"**{killed} of {total} killed**, the others named harmless.",
        "",
        "| part | mutants | killed |",
        "|---|---|---|",
        *(f"| {part} | {rows[part][0]} | {rows[part][1]} |" for part in sorted(rows)),
        *(f"| {part} | {sum(m.part == part for m in listed)} | not run |" for part in missing),
        "",
        "Harmless, and why:",
        "",
        *(f"- {mutant.part}, {mutant.name}: {mutant.harmless}" for mutant in harmless),
    ]
    return "\n".join(lines) + "\n"


def rows_of(text: str) -> dict[str, tuple[int, int]]:
    """The rows of a page."""
    found = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    return {part: (int(total), int(killed)) for part, total, killed in found}


def write_page(results: dict[Mutant, str]) -> None:
    """Write the rows of the parts that were run as a whole; the others stay."""
    listed = list(mutants())
    rows = rows_of(DOCUMENT.read_text())
    for part in {mutant.part for mutant in results}:
        of_part = [mutant for mutant in listed if mutant.part == part]
        if results.keys() >= set(of_part):
            rows[part] = len(of_part), sum(results[mutant] == "killed" for mutant in of_part)
    rows = {part: row for part, row in rows.items() if part in {m.part for m in listed}}
    if rows:
        DOCUMENT.write_text(page(rows, listed))


def main() -> int:
    parser = argparse.ArgumentParser(description="run the named mutants")
    parser.add_argument("words", nargs="*", help="only those with one of these words in part: name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: cores")
    options = parser.parse_args()
    chosen = [
        mutant
        for mutant in mutants()
        if not options.words or any(w in f"{mutant.part}: {mutant.name}" for w in options.words)
    ]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_copies:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(options.jobs):
            copies.put(copy := Copy(Path(folder, str(number))))
            open_copies.callback(copy.close)
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        if copy.run_tests(tests) != GREEN:
            print("expected green tests without a mutant, got red; run them:", *tests)
            return 1

        def result(mutant: Mutant) -> str:
            own = copies.get()
            try:
                return own.try_out(mutant)
            finally:
                copies.put(own)

        with ThreadPoolExecutor(options.jobs) as pool:
            found = list(pool.map(result, chosen))
    results = dict(zip(chosen, found, strict=True))
    wrong = [m for m in chosen if results[m] != ("survived" if m.harmless else "killed")]
    for mutant in wrong:
        print(f"{results[mutant]}: {mutant.part}: {mutant.name} ({' '.join(mutant.tests)})")
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} as they should be")
    not_yet = {mutant.part for mutant in wrong}
    write_page({m: found for m, found in results.items() if m.part not in not_yet})
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
