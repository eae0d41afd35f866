"""The paper's five benchmarks with made videos in place of the published data: a rehearsal.

    .lmms-eval/bin/python benchmarks/lmms/rehearsal.py .cache/lmms/rehearsal

writes a few questions in each data set's own columns, where lmms-eval's unchanged tasks find them
when they run in that directory with ``HF_HOME`` at its ``hf`` and ``HF_HUB_OFFLINE=1``. It shows
that tasks, commands and table work before hours on a GPU, and nothing about accuracy. The videos
are those of ``tasks/made_videos``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lmms.columns import MVBENCH

VIDEOS = Path(__file__).resolve().parents[2] / ".cache" / "lmms" / "videos"
WRONG = ("red", "green", "blue", "yellow")
Row = dict[str, Any]


def write_dataset(
    directory: Path, name: str, configs: Mapping[str, Sequence[Row]], split: str
) -> None:
    """A data set as the hub has it, which ``datasets`` finds in the working directory.

    Args:
        configs: name of the configuration → its rows.
    """
    home = directory / name
    home.mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:"]
    for config, rows in configs.items():
        (home / f"{config}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - split: {split}", f"    path: {config}.jsonl"]
    (home / "README.md").write_text("\n".join([*lines, "---", ""]))


def link(video: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(video)


def options(line: Row, number: int) -> tuple[list[str], int]:
    """Four answers, the right one at a place of its own."""
    wrong = [answer for answer in WRONG if answer != line["answer"]][:3]
    place = number % 4
    return [*wrong[:place], line["answer"], *wrong[place:]], place


def lettered(answers: Sequence[str]) -> list[str]:
    return [f"{letter}. {answer}" for letter, answer in zip("ABCDE", answers, strict=False)]


def write(directory: Path, lines: Sequence[Row]) -> None:
    """All five data sets, from lines of ``questions.jsonl``."""
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    hub = directory / "hf"
    mme, lvb, ego, ocr, mv = [], [], [], [], []
    for number, line in enumerate(lines):
        video, name = VIDEOS / line["video"], f"clip{number}"
        answers, place = options(line, number)
        letter = "ABCD"[place]
        link(video, hub / "videomme" / "data" / f"{name}.mp4")
        mme.append(
            {
                "videoID": name,
                "question_id": name,
                "question": line["question"],
                "options": lettered(answers),
                "answer": letter,
                "domain": "Knowledge",
                "duration": ("short", "medium", "long")[number % 3],
                "task_type": "Counting Problem",
                "sub_category": "Law",
            }
        )
        link(video, hub / "datasets" / "longvideobench" / "videos" / f"{name}.mp4")
        lvb.append(
            {
                "id": name,
                "video_path": f"{name}.mp4",
                "question": line["question"],
                **{f"option{index}": answer for index, answer in enumerate(answers)},
                "option4": "N/A",
                "correct_choice": place,
                "question_category": "S2E",
                "duration_group": (15, 60, 600, 3600)[number % 4],
            }
        )
        link(video, hub / "egoschema" / "videos" / f"{name}.mp4")
        five = lettered([*answers, "purple"])
        ego.append(
            {
                "video_idx": name,
                "question": line["question"],
                "option": five,
                "answer": str(place),
            }
        )
        link(video, directory / "videoocr" / f"{name}.mp4")
        method = ("multiple_choice", "containment_match", "gpt_assisted_scoring")[number % 3]
        ocr.append(
            {
                "video_index": name,
                "question": line["question"],
                "eval_method": method,
                "option": answers,
                "task": "text",
                "task_type": "recognition",
                "answer": letter if method == "multiple_choice" else line["answer"],
            }
        )
        for folder in set(DATA_LIST.values()):
            link(video, hub / "mvbench_video" / folder / f"{name}.mp4")
        mv.append(
            {
                "video": f"{name}.mp4",
                "question": line["question"],
                "candidates": answers,
                "answer": line["answer"],
            }
        )
    write_dataset(directory, "lmms-eval/Video-MME", {"default": mme}, "test")
    write_dataset(directory, "longvideobench/LongVideoBench", {"default": lvb}, "validation")
    write_dataset(directory, "lmms-eval/egoschema", {"Subset": ego}, "test")
    write_dataset(directory, "DogNeverSleep/MME-VideoOCR_Dataset", {"default": ocr}, "train")
    mvbench = {task: mv[: 1 + index % 2] for index, task in enumerate(MVBENCH)}
    write_dataset(directory, "OpenGVLab/MVBench", mvbench, "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--questions", type=int, default=8, help="a benchmark (default: 8)")
    chosen = parser.parse_args()
    if chosen.directory.exists():  # lmms-eval would use what it has cached there
        parser.error(f"expected a directory that does not exist yet, got {chosen.directory}")
    lines = [json.loads(line) for line in (VIDEOS / "questions.jsonl").read_text().splitlines()]
    write(chosen.directory, lines[:: max(1, len(lines) // chosen.questions)][: chosen.questions])
    print(chosen.directory)


if __name__ == "__main__":
    main()
