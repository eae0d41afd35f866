"""A client of a running SGLang server with PEVLM: ask, time, and see what the server computed.

    client = Client("http://localhost:30000")
    answer = client.ask(Path("drive.mp4"), "What happens?", setting={"sink_frames": 2})
    answer.text, answer.ttft

``measure`` is ``ask`` on empty caches, with what the request added to the server's counters.
Nothing of SGLang is imported: the server may run on another machine.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from urllib3.exceptions import ReadTimeoutError

from pevlm_sglang.layout import full_pairs

SERVER_INFO_KEY = "pevlm"
"""Of PEVLM's configuration in ``/server_info``, and of its totals in each internal state there."""

_CONNECT_TIMEOUT = 10.0  # seconds
_FLUSH_TIMEOUT = 30  # seconds that the server waits for its running requests
_SHOWN = 500  # characters of a server's message


class ServerError(ValueError):
    """The server cannot be reached, has no PEVLM, or refused a request; one line says which."""


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        text: its bytes as UTF-8; what is no UTF-8 by itself as surrogate escapes.
        logprob: of this token.
        top: the likeliest tokens at its place → log-prob; empty where none were asked for.
    """

    text: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """One answered request.

    Attributes:
        text: of the answer.
        ttft: seconds from sending the request to its first streamed token.
        prompt_tokens: of the expanded prompt.
        tokens: of the answer, up to the first that SGLang did not stream: one that ends no
            character, or the end of turn. Empty where no log-probs were asked for.
        finish_reason: ``stop``, or ``length`` where ``max_tokens`` cut the answer.
    """

    text: str
    ttft: float
    prompt_tokens: int
    tokens: tuple[Token, ...]
    finish_reason: str


@dataclass(frozen=True)
class Work:
    """What requests added to the server's counters (``observe.Totals``), over all replicas.

    Attributes:
        pairs_computed, pairs_saved: (query, key) pairs of prefill, of one head and layer.
        vision_runs: runs of the vision tower; 0 where its result came from a cache.
        dense_tokens: prefill tokens with full attention, by reason.
    """

    pairs_computed: int
    pairs_saved: int
    vision_runs: int
    dense_tokens: Mapping[str, int]

    @property
    def visible_fraction(self) -> float:
        """Computed pairs over those of full attention; 1 where nothing was computed."""
        pairs = self.pairs_computed + self.pairs_saved
        return self.pairs_computed / pairs if pairs else 1.0

    def is_whole_prompt(self, prompt_tokens: int) -> bool:
        """Whether this is the prefill of one prompt, from its first token and of nothing else."""
        return self.pairs_computed + self.pairs_saved == full_pairs(0, prompt_tokens)


class Client:
    """Requests to one server, without the environment's proxies.

    Args:
        url: of the server, such as ``http://localhost:30000``.
        timeout: seconds that the server may be silent in a request.
        embed_videos: send local files in the request (``data:`` URLs), for a server on another
            machine; otherwise the server opens the path itself.
        api_key: of a server that was started with ``--api-key``.

    Every method raises ServerError where the server is not reachable or refuses.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 600.0,
        *,
        embed_videos: bool = False,
        api_key: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.embed_videos = embed_videos
        self._session = requests.Session()
        self._session.trust_env = False
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def ask(
        self,
        video: Path | str,
        question: str,
        *,
        setting: Mapping[str, Any] | None = None,
        max_tokens: int = 16,
        top_logprobs: int | None = None,
    ) -> Answer:
        """Ask about a video, with greedy decoding.

        Args:
            video: a local file, or an ``http:``, ``https:``, ``file:`` or ``data:`` URL.
            question: follows the video in the prompt.
            setting: PEVLM's options for this request; None leaves the server's own.
            max_tokens: of the answer.
            top_logprobs: log-probs of this many likeliest tokens at every place, 0 of the answer's
                alone; None asks for no log-probs.

        Raises:
            ServerError: see the class; also a stream without a token, or without usage.
            ValueError: the file cannot be read.
        """
        content = [
            {"type": "video_url", "video_url": {"url": self._video_url(video)}},
            {"type": "text", "text": question},
        ]
        body: dict[str, Any] = {
            "model": "default",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if setting is not None:
            body["custom_params"] = {"pevlm": dict(setting)}
        if top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        data = json.dumps(body).encode()  # a large video's text is not made under the clock
        return self._read(self._stream("/v1/chat/completions", data))

    def measure(self, video: Path | str, question: str, **options: Any) -> tuple[Answer, Work]:
        """``ask`` on empty caches.

        ``/flush_cache`` leaves SGLang's cache of video embeddings alone: see ``Work.vision_runs``.
        On a server with other traffic, ``Work`` has its work too: see ``Work.is_whole_prompt``.
        """
        self.flush()
        before = self.counters()
        answer = self.ask(video, question, **options)
        return answer, _difference(before, self.counters())

    def flush(self) -> None:
        """Empty the prefix cache, once running requests have ended."""
        self._json_or_text("POST", f"/flush_cache?timeout={_FLUSH_TIMEOUT}")

    def info(self) -> dict[str, Any]:
        """``/server_info``."""
        response = self._json_or_text("GET", "/server_info")
        if not isinstance(response, dict):
            raise ServerError(f"{self.url}/server_info: expected a JSON object; is it SGLang?")
        return response

    def config(self) -> dict[str, Any]:
        """PEVLM's configuration on the server, with ``frames_per_step`` and ``base_backend``."""
        config = self.info().get(SERVER_INFO_KEY)
        if not isinstance(config, dict):
            raise self._without_pevlm()
        return config

    def counters(self) -> Work:
        """PEVLM's totals since the server's start."""
        states = self.info().get("internal_states") or []
        totals = [state[SERVER_INFO_KEY] for state in states if SERVER_INFO_KEY in state]
        if not totals or len(totals) < len(states):
            raise self._without_pevlm()
        reasons = {reason for total in totals for reason in total["dense_tokens"]}
        return Work(
            pairs_computed=sum(total["pairs_computed"] for total in totals),
            pairs_saved=sum(total["pairs_saved"] for total in totals),
            vision_runs=sum(total["vision_runs"] for total in totals),
            dense_tokens={
                reason: sum(total["dense_tokens"].get(reason, 0) for total in totals)
                for reason in sorted(reasons)
            },
        )

    def _video_url(self, video: Path | str) -> str:
        if isinstance(video, str) and ("://" in video or video.startswith("data:")):
            return video
        path = Path(video).absolute()
        if not path.is_file():
            raise ValueError(f"{path}: expected a video file, got none")
        if not self.embed_videos:
            return path.as_uri()
        kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    def _read(self, events: Iterator[tuple[float, dict[str, Any]]]) -> Answer:
        """The answer in a stream of (seconds since sending, event)."""
        ttft: float | None = None
        prompt_tokens, finish_reason = 0, ""
        text: list[str] = []
        tokens: list[Token] = []
        for seconds, event in events:
            prompt_tokens = (event.get("usage") or {}).get("prompt_tokens", prompt_tokens)
            for choice in event.get("choices") or []:
                piece = choice.get("delta", {}).get("content") or ""
                found = (choice.get("logprobs") or {}).get("content") or []
                finish_reason = choice.get("finish_reason") or finish_reason
                # The first event holds the role alone. A token may decode to no text.
                if ttft is None and (piece or found or finish_reason):
                    ttft = seconds
                text.append(piece)
                tokens += map(_token, found)
        if ttft is None or not prompt_tokens or not finish_reason:
            raise ServerError(
                f"{self.url}: expected a streamed answer with usage and its end, got a stream that "
                "broke off; see the server's log"
            )
        whole = "".join(text)
        return Answer(whole, ttft, prompt_tokens, _spelling(whole, tokens), finish_reason)

    def _stream(self, path: str, data: bytes) -> Iterator[tuple[float, dict[str, Any]]]:
        headers = {"Content-Type": "application/json"}
        start = time.perf_counter()
        with self._request("POST", path, data=data, headers=headers, stream=True) as response:
            for line in response.iter_lines():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise ServerError(f"{self.url}{path}: {_message(event)}")
                yield time.perf_counter() - start, event

    def _json_or_text(self, method: str, path: str) -> Any:
        with self._request(method, path) as response:
            try:
                return response.json()
            except requests.JSONDecodeError:
                return response.text

    @contextmanager
    def _request(self, method: str, path: str, **options: Any) -> Iterator[requests.Response]:
        try:
            with self._session.request(
                method, self.url + path, timeout=(_CONNECT_TIMEOUT, self.timeout), **options
            ) as response:
                if response.status_code != 200:
                    raise ServerError(
                        f"{self.url}{path}: expected HTTP 200, got {response.status_code}: "
                        f"{_message(_decoded(response))}"
                    )
                yield response
        except requests.RequestException as error:
            raise ServerError(f"{self.url}{path}: {self._failure(error)}") from None

    def _failure(self, error: requests.RequestException) -> str:
        # requests passes on a time-out within a stream as a ConnectionError.
        wrapped = error.args[0] if error.args else None
        if isinstance(error, requests.ReadTimeout) or isinstance(wrapped, ReadTimeoutError):
            return (
                f"the server was silent for {self.timeout:g} s; a longer timeout helps if it only "
                "works slowly"
            )
        shown = f"{type(error).__name__}: {str(error)[:_SHOWN]}"
        return f"expected an answer of a running SGLang server, got {shown}"

    def _without_pevlm(self) -> ServerError:
        return ServerError(
            f"{self.url}: the server runs without PEVLM; start it with --attention-backend pevlm"
        )


def _difference(before: Work, after: Work) -> Work:
    return Work(
        after.pairs_computed - before.pairs_computed,
        after.pairs_saved - before.pairs_saved,
        after.vision_runs - before.vision_runs,
        {
            reason: tokens - before.dense_tokens.get(reason, 0)
            for reason, tokens in after.dense_tokens.items()
        },
    )


def _token(found: Mapping[str, Any]) -> Token:
    top: dict[str, float] = {}
    for other in found.get("top_logprobs") or []:
        top.setdefault(_text(other), other["logprob"])  # the likeliest comes first
    return Token(_text(found), found["logprob"], top)


def _spelling(text: str, tokens: Iterable[Token]) -> tuple[Token, ...]:
    """The tokens that spell the beginning of a text.

    SGLang streams log-probs with text. Those of a token without any, such as half a character, are
    lost, or come with what follows; from there on, a token's place is not known.
    """
    left = text.encode(errors="surrogatepass")
    spelt = []
    for token in tokens:
        piece = token.text.encode(errors="surrogateescape")
        if not piece or not left.startswith(piece):
            break
        spelt.append(token)
        left = left.removeprefix(piece)
    return tuple(spelt)


def _text(token: Mapping[str, Any]) -> str:
    """From the bytes: the text of half a character is the same for all of them."""
    encoded = token.get("bytes")
    if encoded is None:
        return str(token["token"])
    return bytes(encoded).decode("utf-8", errors="surrogateescape")


def _decoded(response: requests.Response) -> Any:
    try:
        return response.json()
    except requests.JSONDecodeError:
        return response.text


def _message(answer: Any) -> str:
    """The server's own words in an error."""
    while isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or json.dumps(answer)
    return " ".join(str(answer).split())[:_SHOWN] or "no message"
