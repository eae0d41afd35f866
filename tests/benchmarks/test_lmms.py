"""``benchmarks/lmms`` without lmms-eval: its logs into the paper's table, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lmms import routes
from lmms.columns import BENCHMARKS, PAPER
from lmms.table import RUN, RunError, as_json, collect, render

PEVLM = {"pairs_computed": 30, "pairs_saved": 70, "disabled": 0, "image_runs_off": 0}
FULL = {"pairs_computed": 100, "pairs_saved": 0, "disabled": 9, "image_runs_off": 0}
SETTINGS = {
    "route": "video",
    "launch": ["--tp", "2"],
    "client": "",
    "limit": None,
    "model": "m",
    "pevlm": {"sink_frames": 16},
    "versions": {"lmms-eval": "0.7.3"},
}

# As lmms-eval 0.7.3 logs them: what `process_results` of each task returned for a question.
VERDICTS: dict[str, Callable[[bool, int], Any]] = {
    "mvbench": lambda right, _: {"pred_answer": "A", "gt_answer": "A", "score": int(right)},
    "egoschema": lambda right, _: {"pred": 3 if right else 1, "ground_truth": "3"},
    "videomme": lambda right, number: {
        "duration": ("short", "medium", "long")[number % 3],
        "score": float(right),
    },
    "longvideobench": lambda right, number: {
        "duration_group": (15, 60, 600, 3600)[number % 4],
        "answer": "C",
        "parsed_pred": "C" if right else "A",
    },
    "videoocr": lambda right, _: {"task": "t", "metric": "multiple_choice", "score": float(right)},
    "made_videos": lambda right, _: {"score": float(right), "task": "code", "frames": 64},
}


def write(
    results: Path,
    method: str,
    name: str,
    right: list[bool],
    *,
    counters: dict[str, int] | None = None,
    **settings: Any,
) -> Path:
    """One run as run.py leaves it: every task of the benchmark with these answers."""
    directory = results / method / name
    (directory / "default").mkdir(parents=True)
    counted = counters or {"full": FULL, "pevlm": PEVLM}[method]
    (directory / RUN).write_text(json.dumps({**SETTINGS, **settings, "counters": counted}))
    for task in BENCHMARKS[name].tasks:
        lines = [
            json.dumps(
                {
                    "doc_id": number,
                    "doc_hash": f"h{number}",
                    "filtered_resps": "A",
                    BENCHMARKS[name].verdict: VERDICTS[name](answer, number),
                }
            )
            for number, answer in enumerate(right)
        ]
        log = directory / "default" / f"20260101_samples_{task}.jsonl"
        log.write_text("\n".join(lines) + "\n")
    return directory


def both(results: Path, name: str, full: list[bool], pevlm: list[bool]) -> None:
    write(results, "full", name, full)
    write(results, "pevlm", name, pevlm)


def test_the_papers_columns(tmp_path: Path) -> None:
    for name in PAPER:
        both(tmp_path, name, [True] * 12, [True] * 6 + [False] * 6)
    columns, common = collect(tmp_path)
    assert [*columns] == [
        "MVBench",
        "EgoSchema",
        "VideoMME < 2 min",
        "VideoMME 2 min-1 h",
        "LongVideoBench < 1 min",
        "LongVideoBench 1 min-1 h",
        "MME-VideoOCR",
    ]
    assert [column.questions for column in columns.values()] == [18 * 12, 12, 4, 8, 6, 6, 12]
    # Groups go round by three and by four: of the first six answers, two of three sorts are short.
    accuracies = [round(column.accuracy("pevlm"), 2) for column in columns.values()]
    assert accuracies == [50, 50, 50, 50, 66.67, 33.33, 50]
    assert {column.accuracy("full") for column in columns.values()} == {100.0}
    assert common == SETTINGS


def test_rows_of_the_table(tmp_path: Path) -> None:
    both(tmp_path, "egoschema", [True, True, True, False], [True, False, True, False])
    both(tmp_path, "videoocr", [False, False, True, True], [True, True, True, True])
    columns, common = collect(tmp_path)
    rows = [line.split("  ") for line in render(columns).splitlines()]
    table = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert table["Full attention"] == ["75.00", "50.00", "62.50"]
    assert table["PEVLM"] == ["50.00", "100.00", "75.00"]
    assert table["difference, points"] == ["-25.00", "+50.00", "+12.50"]
    # One of four differs: 1.96 x 0.5 / sqrt(4); two of four: 1.96 x sqrt(1/3) / sqrt(4).
    assert table["95 % interval, ±"] == ["49.00", "56.58"]
    assert table["questions"] == ["4", "4"]
    assert table["visible_fraction"] == ["0.300", "0.300"]
    found = json.loads(as_json(columns, common))
    assert found["columns"]["EgoSchema"] == {
        "full": 75.0,
        "pevlm": 50.0,
        "difference": -25.0,
        "margin": 49.0,
        "questions": 4,
        "visible_fraction": 0.3,
    }
    assert found["route"] == "video"


def test_no_interval_where_no_answer_differs(tmp_path: Path) -> None:
    both(tmp_path, "egoschema", [True, False], [True, False])
    columns, common = collect(tmp_path)
    assert "nan" not in render(columns)
    assert json.loads(as_json(columns, common))["columns"]["EgoSchema"]["margin"] is None


@pytest.mark.parametrize(
    ("method", "counters", "message"),
    [
        ("full", FULL | {"pairs_saved": 1}, "expected full attention, got 1 saved"),
        ("pevlm", PEVLM | {"pairs_saved": 0}, "expected PEVLM to save attention pairs, got 0"),
        ("pevlm", PEVLM | {"image_runs_off": 5}, "got 5 tokens without it, reason image_runs_off"),
        ("pevlm", PEVLM | {"disabled": 4}, "got 4 tokens without it, reason disabled"),
        ("full", FULL | {"pairs_computed": 0}, "expected attention pairs"),
    ],
)
def test_counters_that_belie_the_method(
    tmp_path: Path, method: str, counters: dict[str, int], message: str
) -> None:
    other = {"full": "pevlm", "pevlm": "full"}[method]
    write(tmp_path, method, "egoschema", [True], counters=counters)
    write(tmp_path, other, "egoschema", [True])
    with pytest.raises(RunError, match=message):
        collect(tmp_path)


def test_a_failed_request_is_no_answer(tmp_path: Path) -> None:
    both(tmp_path, "egoschema", [True, True], [True, True])
    log = next((tmp_path / "pevlm").rglob("*.jsonl"))
    failed = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] HTTP 400"
    log.write_text(log.read_text().replace('"A"', json.dumps(failed), 1))
    with pytest.raises(RunError, match=r"question 0: expected an answer, got .*HTTP 400"):
        collect(tmp_path)


def test_methods_that_answered_different_questions(tmp_path: Path) -> None:
    both(tmp_path, "egoschema", [True, True], [True])
    with pytest.raises(RunError, match="egoschema: expected the same questions"):
        collect(tmp_path)


def test_runs_of_different_settings(tmp_path: Path) -> None:
    both(tmp_path, "egoschema", [True], [True])
    write(tmp_path, "full", "videoocr", [True])
    write(tmp_path, "pevlm", "videoocr", [True], pevlm={"sink_frames": 2}, limit=3)
    with pytest.raises(RunError, match="got another limit, pevlm; keep such runs"):
        collect(tmp_path)


def test_a_log_that_is_missing_or_doubled(tmp_path: Path) -> None:
    both(tmp_path, "egoschema", [True], [True])
    log = next((tmp_path / "full").rglob("*.jsonl"))
    log.write_text(log.read_text() * 2)
    with pytest.raises(RunError, match="expected each question once"):
        collect(tmp_path)
    log.unlink()
    with pytest.raises(RunError, match="one log of lmms-eval's egoschema_subset, got 0"):
        collect(tmp_path)


def test_no_benchmark_under_both_methods(tmp_path: Path) -> None:
    write(tmp_path, "full", "egoschema", [True])
    with pytest.raises(RunError, match="expected a benchmark under both methods, got none"):
        collect(tmp_path)


@pytest.mark.parametrize("route", routes.ROUTES)
def test_full_attention_differs_by_one_flag(route: str) -> None:
    pevlm, full = (routes.server_flags(route, method) for method in ("pevlm", "full"))
    assert full == [*pevlm, "--pevlm-enabled", "false"]
    assert ("--pevlm-image-runs" in pevlm) == (route == routes.FRAMES)


def test_flags_for_the_engine() -> None:
    flags = ["--tp", "2", "--mem-fraction-static=0.7", "--sleep-on-idle", "--pevlm-enabled"]
    flags += ["false", "--mm-process-config", '{"video": {"fps": 1, "max_frames": 64}}']
    arguments = routes.engine_arguments(flags)
    assert arguments == {
        "tensor_parallel_size": "2",
        "gpu_memory_utilization": "0.7",
        "sleep_on_idle": "true",
        "pevlm_enabled": "false",
        "mm_process_config": '{"video": {"fps": 1, "max_frames": 64}}',
    }
    assert routes.model_args(arguments).startswith("tensor_parallel_size=2,gpu_memory")
    with pytest.raises(ValueError, match="expected --name, got stray"):
        routes.engine_arguments(["stray"])
    with pytest.raises(ValueError, match="chat_template: expected a value without a comma"):
        routes.model_args({"chat_template": "a,b"})
