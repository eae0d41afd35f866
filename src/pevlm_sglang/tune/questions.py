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
    """A question about a video.

    Attributes:
        video: a local file, or a URL.
        text: asked after the video.
        answer: the right one; None in an unlabelled set.
        key: digest of what is asked: the video's name, the size of its file, and the text.
    """

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
    questions: dict[str, Question] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        question = _parse(where, line, path.parent)
        if question.key in questions:
            raise ValueError(
                f"{where}: expected a new question, got that of line {places[question.key]} again"
            )
        first = next(iter(questions.values()), question)
        if (question.answer is None) != (first.answer is None):
            raise ValueError(
                f"{where}: expected 'answer' in all lines or in none, got a line "
                f"{'without' if question.answer is None else 'with'} one"
            )
        questions[question.key], places[question.key] = question, number
    if not questions:
        raise ValueError(f"{path}: expected one question or more, got none")
    return [*questions.values()]


def _parse(where: str, line: str, directory: Path) -> Question:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r}")
    video, text = (_text(where, content, name) for name in ("video", "question"))
    answer = _text(where, content, "answer") if content.get("answer") is not None else None
    digest = hashlib.sha256(json.dumps([video, text]).encode())
    if "://" in video or video.startswith("data:"):
        return Question(video, text, answer, digest.hexdigest()[:16])
    file = directory / video
    if not file.is_file():
        raise ValueError(f"{where}: expected a video file or a URL, got {file}, which is none")
    digest.update(str(file.stat().st_size).encode())
    return Question(file, text, answer, digest.hexdigest()[:16])


def _text(where: str, content: dict[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name}: expected a text, got {json.dumps(value)[:60]}")
    return value
