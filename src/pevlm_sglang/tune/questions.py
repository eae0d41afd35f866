"""The user's own questions: one JSON object a line.

``{"video": "drive.mp4", "question": "Who brakes first?", "answer": "the van"}``

``video`` is a path relative to the JSONL, or an ``http:``, ``https:``, ``file:`` or ``data:`` URL;
``answer`` stands in all lines or in none; other keys and blank lines are ignored.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """A question about a video: a local file, or a URL; ``answer`` is None in an unlabelled set.
    ``key`` is a digest of what is asked: the video's name, the size of its file, and the text."""

    video: Path | str
    text: str
    answer: str | None
    key: str


def load(path: Path) -> list[Question]:
    """The questions in a file, in its order.

    Raises:
        ValueError: with file, line, what was expected and what came.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text") from None
    questions: list[Question] = []
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        questions.append(question := _parse(where, line, path.parent))
        if (place := places.setdefault(question.key, number)) != number:
            raise ValueError(f"{where}: expected a new question, got that of line {place} again")
        if (question.answer is None) != (questions[0].answer is None):
            raise ValueError(
                f"{where}: expected 'answer' in all lines or in none, got a line "
                f"{'without' if question.answer is None else 'with'} one"
            )
    if not questions:
        raise ValueError(f"{path}: expected one question or more, got none")
    return questions


def is_url(video: str) -> bool:
    return "://" in video or video.startswith("data:")


def _parse(where: str, line: str, directory: Path) -> Question:
    try:
        content, why = json.loads(line), ""
    except ValueError as error:
        content, why = None, f": {error}"
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r}{why}")
    name, text = _text(where, content, "video"), _text(where, content, "question")
    answer = _text(where, content, "answer") if content.get("answer") is not None else None
    digest = hashlib.sha256(json.dumps([name, text]).encode())
    video: Path | str = name
    if not is_url(name):
        video = directory / name
        if not video.is_file():
            raise ValueError(f"{where}: expected a video file or a URL, got {video}, which is none")
        digest.update(str(video.stat().st_size).encode())
    return Question(video, text, answer, digest.hexdigest()[:16])


def _text(where: str, content: dict[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name}: expected a text, got {json.dumps(value)[:60]}")
    return value
