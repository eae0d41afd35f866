"""The accuracy gate without a server: what makes it red, and where its videos put their events."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from accuracy.dataset import EXAMPLE
from accuracy.edges import GROUPS, LAST, LATE_CODE, SECOND, edge_clip
from accuracy.questions import TASKS
from accuracy.server_gate import Comparison, Item
from accuracy.videos import CODE, COLOURS, EVENTS, FILLERS, PLACES

VIDEOS, EACH = 10, 4


def compared(full: float, lost: Mapping[str, float]) -> Comparison:
    """Answers to 40 questions a group, of which full attention knows the first ``full``, and PEVLM
    a share ``lost`` less, spread evenly over the videos."""
    asked, by_full, by_pevlm = [], [], []
    for group in (*TASKS, *GROUPS):
        for number in range(VIDEOS * EACH):
            asked.append(Item(number % VIDEOS, "", group, str(number), ""))
            by_full.append(number < full * VIDEOS * EACH)
            by_pevlm.append(number < (full - lost.get(group, 0)) * VIDEOS * EACH)
    return Comparison(asked, by_full, by_pevlm)


def test_equal_answers_are_green() -> None:
    assert compared(0.9, {}).failures() == []
    assert compared(0.9, {"cross": 0.1, SECOND: 0.1}).failures() == []


@pytest.mark.parametrize("group", [*TASKS, *GROUPS])
def test_one_group_is_lost(group: str) -> None:
    [failure] = compared(0.9, {group: 0.2}).failures()
    assert failure.startswith(f"{group}: expected at most 15 points below")


def test_a_little_is_lost_everywhere() -> None:
    [failure] = compared(0.9, dict.fromkeys(TASKS, 0.1)).failures()
    assert failure.startswith("mean of the tasks")


def test_a_mean_that_is_not_sure_is_red() -> None:
    """Four points lost in the mean, all of them in one video of ten."""
    asked = [Item(n % 10, "", task, str(n), "") for task in TASKS for n in range(50)]
    lost = [item.video == 0 and int(item.text) < 20 for item in asked]
    result = Comparison(asked, [True] * len(asked), [not is_lost for is_lost in lost])
    assert result.overall.mean == pytest.approx(-0.04)
    # shares of the videos: one of -0.1 + 0.004, nine of 0.004; 10 / 9 of their squares' sum
    shares = [-0.04 + 0.004] + 9 * [0.004]
    error = (sum(share**2 for share in shares) * 10 / 9) ** 0.5
    assert result.overall.half_width == pytest.approx(1.96 * error)
    assert [line for line in result.failures() if line.startswith("mean of the tasks")]


def test_a_model_that_guesses_is_red() -> None:
    failures = compared(0.25, {}).failures()
    assert len(failures) == len(TASKS) + len(GROUPS)
    assert all("too little to judge by" in failure for failure in failures)


@pytest.mark.parametrize("number", range(500, 520))
def test_events_stand_at_the_edges(number: int) -> None:
    sink = block = 8
    edge = edge_clip(EXAMPLE, 32, number, sink=sink, block=block)
    world = edge.clip.world
    assert {*edge.groups} <= {*GROUPS}
    assert LATE_CODE in edge.groups
    assert edge.groups.count(LATE_CODE) == 1
    for group, question in zip(edge.groups, edge.clip.questions, strict=True):
        if group == LATE_CODE:
            [scene] = np.flatnonzero(world.shapes == CODE)
            assert scene >= 24
            assert question.answer == "{}{}".format(*world.code)
            continue
        kind, _, event = question.text.rstrip("?").split()
        [scene] = np.flatnonzero(world.shapes == len(FILLERS) + EVENTS.index(event))
        assert (scene - sink) % block == {SECOND: 1, LAST: block - 1}[group]
        assert scene > sink + 1  # a block that begins a step late would still see the sink
        shown = [*COLOURS][world.colours[scene - 1]], PLACES[world.places[scene - 1]]
        assert question.answer == shown[kind == "Place"]
        assert world.shapes[scene - 1] != CODE
