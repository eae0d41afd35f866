"""What ``pevlm tune`` sees of an SGLang server, without one: its HTTP interface, and no model.

The events are those that SGLang 0.5.23 streams. ``tests/server/test_tune.py`` holds the client
against the real one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

PROMPT_TOKENS = 100
ALL_PAIRS = PROMPT_TOKENS * (PROMPT_TOKENS + 1) // 2
END = "<|im_end|>"
CHAT = "/v1/chat/completions"


class FakeServer:
    """An SGLang server's paths on a server of pytest-httpserver.

    Attributes:
        url: of the server.
        pevlm: PEVLM's configuration there; None leaves PEVLM out.
        info: other keys of ``/server_info``.
        wrong: (sink_frames, block_frames) → questions whose answer is ``wrong`` instead of their
            last word.
        delays: the same key, or None for full attention → seconds to the first token.
        sparse: whether PEVLM saves pairs.
        vision_runs, prefilled: of a request, runs of the vision tower and attention pairs.
        refuse: status and body for chat requests instead of an answer.
        events: instead of an answer's own.
    """

    def __init__(self, httpserver: HTTPServer) -> None:
        self.url = httpserver.url_for("").rstrip("/")
        self.totals = [Counter[str](), Counter[str]()]
        self.dense: list[Counter[str]] = [Counter(), Counter()]
        self.pevlm: dict[str, Any] | None = {
            "enabled": True,
            "sink_frames": 16,
            "block_frames": 16,
            "image_runs": False,
            "base_backend": "torch_native",
            "prefill_kernel": "sdpa",
            "frames_per_step": 2,
        }
        self.info: dict[str, Any] = {"model_path": "tiny", "version": "0.5.23", "device": "cpu"}
        self.info |= {"dtype": "float32", "mm_process_config": {"video": {"fps": 2}}}
        self.wrong: dict[tuple[int, int], set[str]] = {}
        self.delays: dict[tuple[int, int] | None, float] = {}
        self.sparse = True
        self.vision_runs = 1
        self.prefilled = ALL_PAIRS
        self.refuse: tuple[int, Any] | None = None
        self.events: list[dict[str, Any]] | None = None
        self._log = httpserver.log
        for path, method, respond in (
            ("/server_info", "GET", lambda _: _json(self._server_info())),
            ("/flush_cache", "POST", lambda _: Response("Cache flushed.")),
            (CHAT, "POST", self._chat),
        ):
            httpserver.expect_request(path, method).respond_with_handler(respond)

    @property
    def requests(self) -> list[Request]:
        """So far."""
        return [request for request, _ in self._log]

    @property
    def order(self) -> list[str]:
        """Paths of all POST requests."""
        return [request.path for request in self.requests if request.method == "POST"]

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Bodies of all chat requests."""
        return [request.get_json() for request in self.requests if request.path == CHAT]

    def settings(self) -> list[tuple[int, int] | None]:
        """Of the chat requests so far; None is full attention."""
        return [_setting(body) for body in self.asked]

    def _server_info(self) -> dict[str, Any]:
        states: list[dict[str, Any]] = [{} for _ in self.totals]
        if self.pevlm is None:
            return {**self.info, "internal_states": states}
        names = ("pairs_computed", "pairs_saved", "vision_runs")
        for state, totals, dense in zip(states, self.totals, self.dense, strict=True):
            reasons = {reason: dense[reason] for reason in ("disabled", "short_video", "no_video")}
            state["pevlm"] = {**{n: totals[n] for n in names}, "dense_tokens": reasons}
        return {**self.info, "pevlm": self.pevlm, "internal_states": states}

    def _chat(self, request: Request) -> Response:
        if self.refuse is not None:
            return _json(self.refuse[1], self.refuse[0])
        return Response(_stream(*self._answer(request.get_json())), mimetype="text/event-stream")

    def _answer(self, body: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
        """Seconds to the first token, and the events."""
        setting, question = _setting(body), body["messages"][0]["content"][1]["text"]
        replica = self.order.count(CHAT) % len(self.totals)
        saved = 1000 if setting and self.sparse else 0
        if not saved:
            self.dense[replica]["short_video" if setting else "disabled"] += PROMPT_TOKENS
        self.totals[replica].update(
            pairs_computed=self.prefilled - saved, pairs_saved=saved, vision_runs=self.vision_runs
        )
        delay = self.delays.get(setting, 0.0)
        if self.events is not None:
            return delay, self.events
        wrong = setting is not None and question in self.wrong.get(setting, ())
        word = "wrong" if wrong else question.split()[-1]
        other = question.split()[-1] if wrong else "wrong"
        logprob = -0.1 if setting is None else -0.3
        return delay, events(word, (word, logprob), other=(other, -2.0))


def events(
    text: str, *tokens: tuple[str, float], other: tuple[str, float] | None = None
) -> list[dict[str, Any]]:
    """A stream: the role, the tokens with the end of turn at once, usage."""
    content = [
        {**_token(*token), "top_logprobs": [_token(*token), *([_token(*other)] if other else [])]}
        for token in (*tokens, (END, -0.01))
    ]
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(content)}
    return [
        {"choices": [{"delta": {"role": "assistant", "content": ""}, "logprobs": None}]},
        {"choices": [{"delta": {"content": text}, "logprobs": {"content": content}}]},
        {"choices": [{"delta": {"content": None}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, mimetype="application/json")


def _stream(delay: float, found: list[dict[str, Any]]) -> Iterator[str]:
    for number, event in enumerate(found):
        if number == 1:  # the first holds the role alone
            time.sleep(delay)
        yield f"data: {json.dumps(event)}\n\n"
    yield "data: [DONE]\n\n"


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


def _setting(body: Mapping[str, Any]) -> tuple[int, int] | None:
    options = body["custom_params"]["pevlm"] if "custom_params" in body else {"enabled": False}
    if options.get("enabled") is False:
        return None
    return options["sink_frames"], options["block_frames"]
