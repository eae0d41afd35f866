"""What ``pevlm tune`` sees of an SGLang server, without one: its HTTP interface, and no model.

The events are those that SGLang 0.5.23 streams. ``tests/server/test_tune.py`` holds the client
against the real one.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

PROMPT_TOKENS = 100
ALL_PAIRS = PROMPT_TOKENS * (PROMPT_TOKENS + 1) // 2
END = "<|im_end|>"


class FakeServer:
    """Answers on a loopback port until its ``with`` block ends.

    Attributes:
        url: of the server.
        asked: bodies of all chat requests.
        headers: of the last request.
        order: paths of all POST requests.
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

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.order: list[str] = []
        self.totals = [Counter[str](), Counter[str]()]
        self.dense: list[Counter[str]] = [Counter(), Counter()]
        self.pevlm: dict[str, Any] | None = {
            "enabled": True,
            "sink_frames": 16,
            "block_frames": 16,
            "image_runs": False,
            "base_backend": "torch_native",
            "prefill_kernel": "sdpa",
            "vision_fixes": True,
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
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

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

    def _answer(self, body: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
        """Seconds to the first token, and the events."""
        self.asked.append(body)
        setting, question = _setting(body), body["messages"][0]["content"][1]["text"]
        replica = len(self.asked) % len(self.totals)
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

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or every request waits 40 ms

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.headers = dict(self.headers)
                self._send(200, fake._server_info())

            def do_POST(self) -> None:
                fake.headers = dict(self.headers)
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fake.order.append(self.path.partition("?")[0])
                if self.path.startswith("/flush_cache"):
                    self._send(200, "Cache flushed.")
                elif fake.refuse is not None:
                    self._send(*fake.refuse)
                else:
                    with contextlib.suppress(ConnectionError):  # a client that gave up
                        self._stream(*fake._answer(json.loads(data)))

            def _send(self, status: int, content: Any) -> None:
                text = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def _stream(self, delay: float, found: list[dict[str, Any]]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for number, event in enumerate(found):
                    if number == 1:  # the first holds the role alone
                        time.sleep(delay)
                    self._chunk(f"data: {json.dumps(event)}\n\n".encode())
                self._chunk(b"data: [DONE]\n\n")
                self._chunk(b"")

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        return Handler


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


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


def _setting(body: Mapping[str, Any]) -> tuple[int, int] | None:
    options = body["custom_params"]["pevlm"] if "custom_params" in body else {"enabled": False}
    if options.get("enabled") is False:
        return None
    return options["sink_frames"], options["block_frames"]
