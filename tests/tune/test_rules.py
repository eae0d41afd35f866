"""The rules of ``pevlm tune``: right answers, distances, intervals, the recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from pevlm_sglang.tune.client import Answer, Token, Work
from pevlm_sglang.tune.measurements import FULL, Measurement, Setting
from pevlm_sglang.tune.questions import Question
from pevlm_sglang.tune.report import table, verdict, warnings
from pevlm_sglang.tune.results import (
    Evaluation,
    Limit,
    evaluate,
    is_right,
    logprob_difference,
    recommend,
)

SMALL, LARGE = Setting(2, 4), Setting(16, 16)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Red", "red"),
        (" the  red\nvan. ", "The red van"),
        ("**red**", "red"),
        ("B", "(B)"),
        ("(b)", "B."),
        ("B. two cars", "B"),
        ("b) two cars", "(B) two cars"),
        ("Answer: B", "B"),
        ("The correct answer is (B).", "B"),
        ("two cars", "B. Two cars"),
        ("-5", "-5."),
        ("?", "?"),
    ],
)
def test_right(given: str, expected: str) -> None:
    assert is_right(given, expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "red"),
        ("dark red", "red"),
        ("A", "B"),
        ("A car is there", "A"),  # an article, no option
        ("B. two cars", "A. two cars"),
        ("three cars", "B. two cars"),
        ("A. red", "red"),  # no multiple choice
        ("5", "-5"),
        ("!", "?"),
        ("99", "9"),
    ],
)
def test_wrong(given: str, expected: str) -> None:
    assert not is_right(given, expected)


def tokens(*found: tuple[str, float, Mapping[str, float]]) -> list[Token]:
    return [Token(*token) for token in found]


def test_logprob_difference_ends_where_the_answers_part() -> None:
    full = tokens(("a", -0.1, {}), ("b", -0.2, {}), ("c", -9.0, {}))
    other = tokens(("a", -0.3, {}), ("x", -0.1, {"x": -0.1, "b": -1.0}), ("c", -0.1, {}))
    assert logprob_difference(full, other) == pytest.approx((0.2 + 0.8) / 2)


def test_logprob_difference_of_an_unlikely_token_is_a_lower_bound() -> None:
    other = tokens(("x", -0.1, {"x": -0.1, "y": -3.0}))
    assert logprob_difference(tokens(("b", -0.5, {})), other) == pytest.approx(2.5)


def test_logprob_difference_of_no_answer() -> None:
    assert logprob_difference([], tokens(("x", -0.1, {}))) is None


# --- Results and the recommendation ----------------------------------------------------------


def make_evaluation(
    rows: Mapping[Setting, tuple[Sequence[str], Sequence[float]]],
    *,
    videos: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    saved: Mapping[Setting, Sequence[int]] | None = None,
) -> Evaluation:
    """From (answers, times) a setting, a question each; 100 pairs a prompt, half of them saved."""
    number = len(rows[FULL][0])
    videos = videos or [f"{i}.mp4" for i in range(number)]
    questions = [
        Question(videos[i], "?", answers[i] if answers else None, f"key {i}") for i in range(number)
    ]
    done = {}
    for setting, (texts, times) in rows.items():
        for i, (question, text, time) in enumerate(zip(questions, texts, times, strict=True)):
            skipped = (saved or {}).get(setting, [0 if setting.is_full else 50] * number)[i]
            answer = Answer(text, time, 13, (Token(text, -0.1, {text: -0.1}),), "stop")
            measured = Measurement(
                setting, question.key, answer, Work(100 - skipped, skipped, 1, {})
            )
            done[setting, question.key] = measured
    return evaluate(questions, [*rows], done)


def repeated(text: str, time: float, number: int = 4) -> tuple[list[str], list[float]]:
    return [text] * number, [time] * number


ALL_RIGHT = {
    FULL: repeated("red", 3.0),
    SMALL: repeated("red", 1.0),
    LARGE: repeated("red", 2.0),
}


def test_of_equals_the_fastest() -> None:
    evaluation = make_evaluation(ALL_RIGHT, answers=["red"] * 4)
    found = recommend(evaluation, Limit(5.0, 0.9))
    assert found.best is not None
    assert found.best.setting == SMALL
    assert [rival.setting for rival in found.rivals] == [LARGE, FULL], "the fastest first"


def test_the_best_within_the_limit() -> None:
    rows = {**ALL_RIGHT, SMALL: (["red", "red", "red", "blue"], [1.0] * 4)}
    evaluation = make_evaluation(rows, answers=["red"] * 4)
    for seconds, expected in ((5.0, LARGE), (2.0, LARGE), (1.5, SMALL)):
        found = recommend(evaluation, Limit(seconds, 0.9))
        assert found.best is not None
        assert found.best.setting == expected
    none = recommend(evaluation, Limit(0.9, 0.9))
    assert none.best is None
    assert none.nearest.setting == SMALL
    assert verdict(Limit(0.9, 0.9), none) == (
        "no setting is within 0.9 s at the 0.9 quantile; the nearest is a sink of 2 and blocks "
        "of 4 frames: 1 s"
    )


def test_full_attention_may_be_the_best() -> None:
    rows = {**ALL_RIGHT, SMALL: repeated("blue", 1.0), LARGE: repeated("blue", 2.0)}
    found = recommend(make_evaluation(rows, answers=["red"] * 4), Limit(3.0, 0.9))
    assert found.best is not None
    assert found.best.setting == FULL
    assert found.rivals == ()


def test_the_limit_is_on_the_quantile() -> None:
    rows = {FULL: repeated("red", 9.0), SMALL: (["red"] * 4, [1.0, 1.0, 1.0, 5.0])}
    evaluation = make_evaluation(rows, answers=["red"] * 4)
    assert recommend(evaluation, Limit(1.0, 0.5)).best is not None
    assert recommend(evaluation, Limit(1.0, 1.0)).best is None


def test_a_setting_that_saved_nothing_is_not_recommended() -> None:
    saved = {SMALL: [0] * 4, LARGE: [0, 50, 50, 50]}
    evaluation = make_evaluation(ALL_RIGHT, saved=saved)
    found = recommend(evaluation, Limit(5.0, 0.9))
    assert found.best is not None
    assert found.best.setting == LARGE
    said = "\n".join(warnings(evaluation, found))
    assert "never anything but full attention, and not recommended: 2 / 4" in said
    assert "full attention, of 4 prompts: 16 / 16 for 1" in said


def test_nothing_saved_at_all() -> None:
    saved = {SMALL: [0] * 4, LARGE: [0] * 4}
    with pytest.raises(ValueError, match="no setting saved an attention pair"):
        recommend(make_evaluation(ALL_RIGHT, saved=saved), Limit(5.0, 0.9))


def test_a_clear_difference_has_no_rivals_and_no_warning() -> None:
    rows = {FULL: repeated("red", 3.0, 40), SMALL: repeated("blue", 1.0, 40)}
    evaluation = make_evaluation(rows, answers=["red"] * 40)
    found = recommend(evaluation, Limit(5.0, 0.9))
    assert found.rivals == ()
    assert warnings(evaluation, found) == []
    assert evaluation.results[1].difference.value == -1


def test_a_small_difference_is_warned_of() -> None:
    rows = {FULL: repeated("red", 3.0, 40), SMALL: (["red"] * 39 + ["blue"], [1.0] * 40)}
    evaluation = make_evaluation(rows, answers=["red"] * 40)
    [warning] = warnings(evaluation, recommend(evaluation, Limit(5.0, 0.9)))
    assert "40 questions cannot tell full attention from 2 / 4" in warning


def test_intervals_are_over_videos() -> None:
    """Twenty questions about two videos are two observations, not twenty."""
    texts = ["red"] * 10 + ["blue"] * 10
    rows = {FULL: (texts, [1.0] * 20), SMALL: (texts, [1.0] * 20)}
    two = make_evaluation(rows, answers=["red"] * 20, videos=["a"] * 10 + ["b"] * 10)
    many = make_evaluation(rows, answers=["red"] * 20)
    assert two.num_videos == 2
    assert (two.results[0].score.low, two.results[0].score.high) == (0, 1)
    assert 0.2 < many.results[0].score.low < 0.5 < many.results[0].score.high < 0.8
    [few, _] = warnings(two, recommend(two, Limit(5.0, 0.9)))
    assert few.startswith("few videos (2)")


def test_unlabelled_agreement() -> None:
    rows = {FULL: repeated("red", 3.0), SMALL: (["red", "red", "red", "Red"], [1.0] * 4)}
    evaluation = make_evaluation(rows)
    full, small = evaluation.results
    assert (full.accuracy, small.accuracy) == (None, None)
    assert (full.score.value, small.score.value) == (1.0, 0.75), "agreement is exact"
    assert small.logprob_difference == 0
    assert small.visible_fraction == 0.5
    assert table(evaluation, Limit(1.0, 0.95)).splitlines()[0].split()[-4:] == [
        *("TTFT", "p90", "TTFT", "p95"),
    ]
