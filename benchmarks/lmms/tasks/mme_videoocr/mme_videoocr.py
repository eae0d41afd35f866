"""MME-VideoOCR's own task code, for lmms-eval 0.7.

The benchmark publishes a task for an older lmms-eval, which 0.7 cannot run (it names a video by a
string instead of a list, and a metric that its results do not have). This takes prompts and scores
from there, unchanged, and needs two variables:

- ``MME_VIDEOOCR``: a clone of github.com/DogNeverSleep/MME-VideoOCR, with an ``API_KEY`` of any
  sort in its ``utils.py`` (it makes a client that is never used here);
- ``MME_VIDEOOCR_VIDEOS``: the folder of its mp4 files.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CODE = "evaluation/automated_evaluation/mme_videoocr/utils.py"
JUDGED = "gpt_assisted_scoring"


def _variable(name: str) -> Path:
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"{name}: expected a folder, got none; see benchmarks/lmms/README.md")
    return Path(value)


def _published() -> Any:
    path = _variable("MME_VIDEOOCR") / CODE
    spec = importlib.util.spec_from_file_location("mme_videoocr_published", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ValueError(f"MME_VIDEOOCR: expected a clone with {CODE}, got none")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLISHED = _published()


def unjudged(dataset: Any) -> Any:
    """The questions that need no judge."""
    return dataset.filter(lambda row: row["eval_method"].strip() != JUDGED)


def video(doc: dict[str, Any]) -> list[str]:
    """The video's path, which must exist."""
    path = _variable("MME_VIDEOOCR_VIDEOS") / f"{doc['video_index']}.mp4"
    if not path.exists():
        raise ValueError(f"MME_VIDEOOCR_VIDEOS: expected {path.name} there, got none")
    return [str(path.resolve())]


def prompt(doc: dict[str, Any]) -> str:
    """The published prompt."""
    return str(PUBLISHED.mme_videoocr_doc_to_text(doc))


def score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The published score: text contained, or the option's letter."""
    return {"videoocr_accuracy": PUBLISHED.mme_videoocr_process_results(doc, results)["score"]}


def percentage(results: Sequence[dict[str, Any]]) -> float:
    return 100 * sum(result["score"] for result in results) / len(results)
