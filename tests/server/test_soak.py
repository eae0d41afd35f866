"""Under load from many sides a server says what it says when it is asked alone.

``make soak`` takes ten minutes (``--soak-seconds``); what runs here otherwise takes two.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from server.conftest import FEW_TOKENS, NO_EMBEDDING_CACHE
from support.broken_masks import plugin_path
from support.exchange import IMAGE, SYSTEM, VIDEO, Exchange, Question, about, user
from support.families.qwen_vl import QwenVLOracle
from support.oracle import Setting
from support.server import Server
from support.soak import Known, Report, Soak, ask_alone, body, check, videos_bad
from support.soak_faults import FAULTS, VARIABLE

Clip = Callable[..., Path]
Picture = Callable[[int], Path]

pytestmark = pytest.mark.server

SMALL_CHUNKS = (
    *("--chunked-prefill-size", "64", "--enable-mixed-chunk", "--disable-overlap-schedule"),
)
SERVERS = {
    "chunk_64_mixed_retracting": (SMALL_CHUNKS, {"SGLANG_TEST_RETRACT": "1", **NO_EMBEDDING_CACHE}),
    "chunk_512": (("--chunked-prefill-size", "512"), {}),
}
"""Name → flags and environment."""

# The C library keeps what is freed, in arenas a thread and in holes; so resident memory would go up
# and down by 3 % without a leak.
PLAIN_MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
WARM_UP = 10  # seconds, after which all is in memory that stays there

SETTINGS = (Setting(16, 16), Setting(4, 4), Setting(0, 6), None)
CLIPS = ((10, 0), (14, 1), (14, 2), (24, 3))  # seconds, which are steps, and a seed


def start(directory: Path, *flags: str, env: dict[str, str]) -> Server:
    flags = ("--attention-backend", "pevlm", *FEW_TOKENS, "--enable-priority-scheduling", *flags)
    return Server(directory, *flags, env={**PLAIN_MALLOC, **env}, startup_timeout=600)


@pytest.fixture(scope="module")
def known(model: Callable[[str], Path], clip: Clip, picture: Picture) -> list[Known]:
    """Questions that have been asked alone, and equal the oracle."""
    questions = [
        *(
            Question(SYSTEM + user(text), new_tokens=n)
            for text, n in (("Why?", 12), ("Say it.", 3))
        ),
        *(
            about(clip(seconds, seed), setting=setting, new_tokens=4 + seconds // 3)
            for (seconds, seed), setting in product(CLIPS, SETTINGS)
        ),
        *(
            Question(
                SYSTEM + user(f"{VIDEO}then {VIDEO}?"),
                (clip(14, first), clip(14, second)),
                setting=setting,
                new_tokens=6,
            )
            for (first, second), setting in product([(1, 2), (2, 1)], SETTINGS[1:])
        ),
        Question(SYSTEM + user(IMAGE + "What is it?"), images=(picture(5),), new_tokens=6),
        Question(
            SYSTEM + user(f"{VIDEO}then {IMAGE}?"),
            (clip(10),),
            (picture(0),),
            Setting(2, 2),
            new_tokens=6,
        ),
    ]
    directory = model("qwen2_5_vl")
    with start(directory, "--chunked-prefill-size", "257", env={}) as server:
        found = ask_alone(Exchange(server, QwenVLOracle(directory)), questions)
    assert len(found) >= 0.8 * len(questions)
    return found


@pytest.fixture(scope="module")
def bad(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Requests to refuse."""
    question = about(clip(14, 1))
    override = {"custom_params": {"pevlm": {"sink_frames": -1}}}
    broken = videos_bad(clip(14, 1), tmp_path_factory.mktemp("broken"))
    return [
        *(body(question, video_data=[str(path)]) for path in broken),
        body(question, video_data=["/nowhere/video.mp4"]),
        body(question, video_data=[{"url": str(clip(14, 1)), "fps": -1}]),
        body(question, video_data=[{"url": str(clip(14, 1)), "max_frames": 10**9}]),
        body(question, sampling_params={"max_new_tokens": 4, **override}),
        body(about(clip(0.25))),
        body(Question("a " * 200_000)),
        body(question, session_params={"id": "nobody's"}),
    ]


def soak(
    server: Server, known: list[Known], bad: list[dict[str, Any]], **options: Any
) -> tuple[Report, dict[str, Any]]:
    """What a soak saw, and the server's own totals afterwards."""
    report = Soak(server, known, bad, **options).run()
    print(report.describe(), file=sys.stderr)
    totals: dict[str, Any] = server.info()["internal_states"][0]["pevlm"]
    return report, totals


@pytest.mark.parametrize("name", SERVERS)
def test_soak(
    name: str,
    known: list[Known],
    bad: list[dict[str, Any]],
    model: Callable[[str], Path],
    pytestconfig: pytest.Config,
) -> None:
    flags, env = SERVERS[name]
    seconds = pytestconfig.getoption("--soak-seconds") / len(SERVERS)
    with start(model("qwen2_5_vl"), *flags, env=env) as server:
        warm, _ = soak(server, known, bad, seconds=WARM_UP, seed=1)
        assert not warm.failures, warm.describe()
        report, totals = soak(server, known, bad, seconds=seconds - WARM_UP)
        check(report, answers=int(seconds) // 2, seconds=seconds)
        assert totals["vision_kept_bytes"] == 0
        assert totals["sparse_forwards"] > 0
        assert ("Testing retraction" in server.log()) == ("SGLANG_TEST_RETRACT" in env)
        assert server.alive()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(
    fault: str,
    known: list[Known],
    bad: list[dict[str, Any]],
    model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = f"{plugin_path(tmp_path, 'soak_faults')}:{os.environ.get('PYTHONPATH', '')}"
    env = {"PYTHONPATH": path, VARIABLE: fault}
    with start(model("qwen2_5_vl"), *SMALL_CHUNKS, env=env) as server:
        report, _ = soak(server, known, bad, seconds=60, most_failures=1)
    assert report.failures
    assert any(
        "expected tokens" in failure or "log-probabilities differ" in failure
        for failure in report.failures
    ), report.describe()


@pytest.mark.parametrize(
    ("report", "what"),
    [
        (Report(compared=Counter(whole=5), memory={"launcher": [1, 100, 101, 103]}), "grows"),
        (Report(compared=Counter(whole=4)), "4"),
        (Report(compared=Counter(whole=5), failures=["ask: HTTP 500"]), "HTTP 500"),
    ],
)
def test_check(report: Report, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        check(report, answers=5, seconds=300)
    sound = Report(compared=Counter(whole=5), memory={"launcher": [1, 100, 101, 102]})
    check(sound, answers=5, seconds=300)
    short = Report(compared=Counter(whole=5), memory={"launcher": [1, 100, 101, 106]})
    with pytest.raises(AssertionError, match="grows"):
        check(short, answers=5, seconds=60)
