"""What lmms-eval logged of full attention and of PEVLM → the paper's Table 1.

    python benchmarks/lmms/table.py .cache/lmms/results

``run.py`` prints it too; this prints it again, from the benchmarks that the directory has by now.
The difference is paired (the same questions), and so is its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lmms.columns import BENCHMARKS, Benchmark

METHODS = {"full": "Full attention", "pevlm": "PEVLM"}
FAILED = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED")
"""What lmms-eval writes in place of an answer that never came; it goes on and scores it."""
SAME = ("route", "launch", "client", "limit", "model", "pevlm", "versions")
"""Of ``run.json``: what must not differ between the runs of one table."""
RUN = "run.json"


class RunError(Exception):
    """A run that must not become a number in a table."""


@dataclass(frozen=True)
class Column:
    """One column: paired answers.

    Attributes:
        right: method → whether each question was answered rightly, in the same order.
        visible_fraction: of PEVLM, over the column's whole benchmark.
    """

    right: dict[str, list[bool]]
    visible_fraction: float

    @property
    def questions(self) -> int:
        return len(self.right["full"])

    def accuracy(self, method: str) -> float:
        """In per cent."""
        return 100 * statistics.fmean(self.right[method])

    def difference(self) -> float:
        """PEVLM less full attention, in points."""
        return self.accuracy("pevlm") - self.accuracy("full")

    def margin(self) -> float:
        """Half of the difference's 95 % interval, in points; nan where no answer differs, from
        which no interval follows."""
        pairs = zip(self.right["pevlm"], self.right["full"], strict=True)
        differences = [float(pevlm) - float(full) for pevlm, full in pairs]
        if len(set(differences)) < 2:
            return math.nan
        return 196 * statistics.stdev(differences) / math.sqrt(len(differences))


def read_samples(directory: Path, benchmark: Benchmark) -> dict[tuple[str, str], Any]:
    """The logged questions of one run.

    Returns:
        (task, hash of the question) → verdict

    Raises:
        RunError: a task without a log, a request that failed, a question logged twice.
    """
    found: dict[tuple[str, str], Any] = {}
    for task in benchmark.tasks:
        logs = sorted(directory.rglob(f"*_samples_{task}.jsonl"))
        if len(logs) != 1:
            raise RunError(
                f"{directory}: expected one log of lmms-eval's {task}, got {len(logs)}; it ends "
                "with status 0 after an error too, see lmms_eval.log there"
            )
        for line in logs[0].read_text().splitlines():
            sample = json.loads(line)
            responses = str(sample["filtered_resps"])
            if any(mark in responses for mark in FAILED):
                raise RunError(
                    f"{task}, question {sample['doc_id']}: expected an answer, got {responses}; "
                    "lmms-eval scores such a question as if it had been answered"
                )
            key = (task, f"{sample['doc_id']} {sample['doc_hash']}")
            if key in found:
                raise RunError(f"{logs[0]}: expected each question once, got {key[1]} twice")
            found[key] = sample[benchmark.verdict]
    return found


def columns_of(name: str, runs: dict[str, Path]) -> dict[str, Column]:
    """The columns of one benchmark, by title; those without a question are left out.

    Args:
        runs: method → directory with lmms-eval's logs and ``run.json``.

    Raises:
        RunError: the methods answered different questions, or ``read_samples`` refuses one.
    """
    benchmark = BENCHMARKS[name]
    samples = {method: read_samples(path, benchmark) for method, path in runs.items()}
    if samples["full"].keys() != samples["pevlm"].keys():
        raise RunError(f"{name}: expected the same questions of both methods, got different ones")
    fraction = visible_fraction(json.loads((runs["pevlm"] / RUN).read_text())["counters"])
    columns = {}
    for title, belongs in benchmark.columns.items():
        keys = [key for key, verdict in samples["full"].items() if belongs(verdict)]
        if keys:
            right = {
                method: [benchmark.right(found[key]) for key in keys]
                for method, found in samples.items()
            }
            columns[title] = Column(right, fraction)
    return columns


def visible_fraction(counters: dict[str, int]) -> float:
    """Attention pairs that were computed, of those that full attention computes."""
    return counters["pairs_computed"] / (counters["pairs_computed"] + counters["pairs_saved"])


def check_counters(method: str, name: str, counters: dict[str, int]) -> None:
    """What the server counted during a run must be the method's.

    Raises:
        RunError: full attention that saved pairs, PEVLM that saved none or was not always on.
    """
    saved = counters["pairs_saved"]
    if counters["pairs_computed"] <= 0:
        raise RunError(f"{name}, {method}: expected attention pairs in /server_info, got none")
    if method == "full":
        if saved:
            raise RunError(f"{name}: expected full attention, got {saved} saved attention pairs")
        return
    if not saved:
        raise RunError(
            f"{name}: expected PEVLM to save attention pairs, got 0; tokens by reason: {counters}; "
            "short_video: its sink and one block hold every video, sample more frames or set "
            "--pevlm-sink-frames and --pevlm-block-frames"
        )
    for reason in ("disabled", "image_runs_off"):
        if counters[reason]:
            raise RunError(
                f"{name}: expected PEVLM for every request, got {counters[reason]} tokens without "
                f"it, reason {reason}"
            )


def collect(results: Path) -> tuple[dict[str, Column], dict[str, Any]]:
    """Every benchmark that ``results`` has under both methods.

    Returns:
        title → column, and what the runs have in common

    Raises:
        RunError: runs of different settings, or one that must not become a number.
    """
    columns: dict[str, Column] = {}
    common: dict[str, Any] = {}
    for name in BENCHMARKS:
        runs = {method: results / method / name for method in METHODS}
        if not all((path / RUN).exists() for path in runs.values()):
            continue
        for method, path in runs.items():
            run = json.loads((path / RUN).read_text())
            check_counters(method, name, run["counters"])
            settings = {key: run[key] for key in SAME}
            common = common or settings
            different = [key for key in SAME if common[key] != settings[key]]
            if different:
                raise RunError(
                    f"{path}: expected the settings of the other runs in {results}, got another "
                    f"{', '.join(different)}; keep such runs in a directory of their own"
                )
        columns |= columns_of(name, runs)
    if not columns:
        raise RunError(f"{results}: expected a benchmark under both methods, got none; use run.py")
    return columns, common


def render(columns: dict[str, Column]) -> str:
    """Methods in the rows, benchmarks in the columns, per cent; the last column is their mean."""
    mean = {m: statistics.fmean(c.accuracy(m) for c in columns.values()) for m in METHODS}
    rows = [["", *columns, "Avg."]]
    for method, title in METHODS.items():
        cells = [f"{column.accuracy(method):.2f}" for column in columns.values()]
        rows.append([title, *cells, f"{mean[method]:.2f}"])
    rows += [
        [
            "difference, points",
            *(f"{column.difference():+.2f}" for column in columns.values()),
            f"{mean['pevlm'] - mean['full']:+.2f}",
        ],
        ["95 % interval, ±", *(_two(column.margin()) for column in columns.values()), ""],
        ["questions", *(str(column.questions) for column in columns.values()), ""],
        ["visible_fraction", *(f"{c.visible_fraction:.3f}" for c in columns.values()), ""],
    ]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _two(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def as_json(columns: dict[str, Column], common: dict[str, Any]) -> str:
    """The table as one line of JSON."""
    found = {
        title: {
            "full": round(column.accuracy("full"), 2),
            "pevlm": round(column.accuracy("pevlm"), 2),
            "difference": round(column.difference(), 2),
            "margin": None if math.isnan(column.margin()) else round(column.margin(), 2),
            "questions": column.questions,
            "visible_fraction": round(column.visible_fraction, 4),
        }
        for title, column in columns.items()
    }
    return json.dumps({**common, "columns": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the --results of run.py")
    try:
        columns, common = collect(parser.parse_args().results)
    except RunError as error:
        sys.exit(f"table: {error}")
    print(render(columns) + "\n\n" + as_json(columns, common))


if __name__ == "__main__":
    main()
