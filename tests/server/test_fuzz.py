"""Broken requests to a real server: 4xx or an answer, in time, and the server goes on.

``make fuzz`` tries a thousand (``--fuzz-requests``); one that fails is named by its number, from
which ``support.fuzz_requests.mutated`` makes it again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.conftest import FEW_TOKENS
from support.exchange import SYSTEM, VIDEO, user
from support.fuzz_requests import Base, fuzz, known_fields
from support.server import Server

pytestmark = pytest.mark.server

GENERATE, CHAT = "/generate", "/v1/chat/completions"
GROWTH = 1.03  # of a process's memory, from a quarter of the requests to the end
SMALL = (
    *("--context-length", "512"),  # or max_new_tokens of 10^9 takes its time
    *("--pevlm-sink-frames", "2", "--pevlm-block-frames", "2"),
)


@pytest.fixture(scope="module")
def server(model: Callable[[str], Path]) -> Iterator[Server]:
    flags = ("--attention-backend", "pevlm", *FEW_TOKENS, *SMALL)
    env = {"MALLOC_ARENA_MAX": "2"}
    with Server(model("qwen2_5_vl"), *flags, env=env, startup_timeout=600) as server:
        yield server


def bases(clip: Path) -> list[Base]:
    """Sound requests."""
    greedy = {"max_new_tokens": 2, "temperature": 0}
    override = {"custom_params": {"pevlm": {"sink_frames": 4}}}
    parts = [
        {"type": "video_url", "video_url": {"url": str(clip), "fps": 2}},
        {"type": "text", "text": "What?"},
    ]
    chat = {"model": "tiny", "max_tokens": 2, "temperature": 0}
    return [
        Base(GENERATE, body, known_fields(GENERATE))
        for body in (
            {
                "text": SYSTEM + user(VIDEO + "What?"),
                "video_data": [{"url": str(clip), "max_frames": 8}],
                "sampling_params": {**greedy, **override},
            },
            {
                "text": SYSTEM + user("What?"),
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": 2,
                "token_ids_logprob": [1, 2],
                "sampling_params": greedy,
            },
            {
                "text": ["What?", VIDEO],
                "video_data": [None, [str(clip)]],
                "sampling_params": [greedy, greedy],
            },
        )
    ] + [
        Base(CHAT, body, known_fields(CHAT))
        for body in (
            {**chat, **override, "messages": [{"role": "user", "content": parts}]},
            {
                **chat,
                "messages": [
                    {"role": "system", "content": "a"},
                    {"role": "user", "content": "What?"},
                ],
            },
        )
    ]


def test_broken_requests(
    server: Server, clip: Callable[..., Path], pytestconfig: pytest.Config
) -> None:
    count = pytestconfig.getoption("--fuzz-requests")
    question: dict[str, Any] = {
        "text": SYSTEM + user(VIDEO + "What?"),
        "video_data": [str(clip(5))],
        "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
    }
    expected = server.generate(**question)["output_ids"]

    def is_well() -> bool:
        answer = server.post("/generate", question, timeout=60)
        return answer.status_code == 200 and answer.json()["output_ids"] == expected

    report = fuzz(server, bases(clip(5)), range(count), is_well)
    print(report.describe(), file=sys.stderr)
    assert not report.failures, report.describe()
    assert report.statuses.total() == count
    assert {200, 400} <= {*report.statuses}
    for name, (quarter, end) in report.memory.items():
        assert end <= GROWTH * quarter, f"{name} grows\n{report.describe()}"
    assert server.info()["internal_states"][0]["pevlm"]["vision_kept_bytes"] == 0


def test_what_goes_wrong_is_seen(server: Server, clip: Callable[..., Path]) -> None:
    """Last in this file: a sound question that is answered wrong, and a server that dies."""
    report = fuzz(server, bases(clip(5)), range(3), lambda: False)
    assert "wrong answer" in report.failures[0]
    report = fuzz(server, bases(clip(5)), range(3), lambda: kill(server.pid))
    assert "gone" in report.failures[0]


def kill(pid: int) -> bool:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return True
