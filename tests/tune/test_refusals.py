"""``pevlm tune`` refuses what would give wrong figures: servers, questions, sizes, places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.fake_server import FakeServer


def dense(server: FakeServer) -> None:
    server.sparse = False


def cached(server: FakeServer) -> None:
    server.prefilled -= 7


def embedding_cached(server: FakeServer) -> None:
    server.vision_runs = 0


def without_pevlm(server: FakeServer) -> None:
    server.pevlm = None


def refusing(server: FakeServer) -> None:
    server.refuse = 400, {"message": "Could not decode video"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (dense, "no setting saved an attention pair"),
        (cached, "a measured server must have no other traffic"),
        (embedding_cached, "the vision tower did not run, though caches were flushed"),
        (without_pevlm, "runs without PEVLM"),
        (refusing, "got 400: Could not decode video"),
    ],
)
def test_a_server_that_does_not_do_it(
    server: FakeServer,
    questions: Path,
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[FakeServer], None],
    message: str,
) -> None:
    spoil(server)
    assert run(questions) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "preset.yaml").exists()


def test_measurements_before_an_error_are_kept(
    server: FakeServer,
    questions: Path,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = server._answer

    def third_question_fails(body: dict[str, Any]) -> Any:
        server.vision_runs = 0 if len(server.asked) >= 20 else 1
        return answer(body)

    monkeypatch.setattr(server, "_answer", third_question_fails)
    assert run(questions) == 2
    assert "15 of 30 measurements are in" in capsys.readouterr().err
    assert len((tmp_path / "out" / "measurements.jsonl").read_text().splitlines()) == 15


def test_pevlm_that_is_off(
    server: FakeServer,
    questions: Path,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = server._answer

    def dense_answer(body: dict[str, Any]) -> Any:
        server.dense[0]["no_video"] += 100
        return answer(body)

    monkeypatch.setattr(server, "_answer", dense_answer)
    assert run(questions) == 2
    assert "2 / 4" in (err := capsys.readouterr().err)
    assert "PEVLM left tokens to full attention: {'no_video': 100}" in err


GOOD = {"video": "a.mp4", "question": "Say red", "answer": "red"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{video"], "line 2: expected a JSON object, got '{video'"),
        ([[1]], "line 1: expected a JSON object, got '[1]'"),
        ([GOOD, "", {**GOOD, "video": 3}], "line 3: video: expected a text, got 3"),
        ([{**GOOD, "question": " "}], 'line 1: question: expected a text, got " "'),
        ([{"video": "a.mp4"}], "line 1: question: expected a text, got null"),
        ([{**GOOD, "answer": 5}], "line 1: answer: expected a text, got 5"),
        ([{**GOOD, "video": "c.mp4"}], "line 1: expected a video file or a URL, got"),
        ([GOOD, GOOD], "line 2: expected a new question, got that of line 1 again"),
        (
            [GOOD, {"video": "b.mp4", "question": "Say red"}],
            "line 2: expected 'answer' in all lines or in none, got a line without one",
        ),
        ([""], "questions.jsonl: expected one question or more, got none"),
    ],
)
def test_bad_questions(
    write: Callable[..., Path],
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    lines: list[Any],
    message: str,
) -> None:
    assert run(write(*lines)) == 2
    assert message in capsys.readouterr().err


def test_no_questions_file(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "none.jsonl") == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    assert run(tmp_path / "latin.jsonl") == 2
    assert "latin.jsonl: expected UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("--sink-frames 3 --block-frames 4", "sink_frames: expected multiples of 2"),
        ("--sink-frames 2 --block-frames 0", "block_frames: expected >= 1, got 0"),
        ("--sink-frames 2 2 --block-frames 4", "sink_frames: expected each size once, got 2 2"),
    ],
)
def test_bad_sizes(
    questions: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    sizes: str,
    message: str,
) -> None:
    assert run(questions, sizes=sizes.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", ["--latency 0", "--latency nan", "--latency x", "--quantile 1.1", "--max-tokens 0"]
)
def test_bad_flags(questions: Path, run: Callable[..., int], flags: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run(questions, *flags.split())
    assert caught.value.code == 2


def test_unwritable_output(
    questions: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert run(questions) == 2
    assert "out: cannot be written" in capsys.readouterr().err
