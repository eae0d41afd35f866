"""The local task's functions, as lmms-eval calls them; see ``made_videos.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

VIDEOS = Path(".cache/lmms/videos")


def video(doc: dict[str, Any]) -> list[str]:
    """The video's absolute path."""
    return [str((VIDEOS / doc["video"]).resolve())]


def score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Right is the answer itself and nothing else."""
    right = results[0].strip() == doc["answer"]
    return {
        "made_videos_accuracy": {
            "score": float(right),
            "task": doc["task"],
            "frames": doc["frames"],
        }
    }


def percentage(results: Sequence[dict[str, Any]]) -> float:
    return 100 * sum(result["score"] for result in results) / len(results)
