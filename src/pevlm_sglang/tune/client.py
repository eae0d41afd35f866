"""A client of a running SGLang server with PEVLM: ask, time, and see what the server computed.

    answer = Client("http://localhost:30000").ask(Path("drive.mp4"), "What happens?")

Nothing of SGLang is imported: the server may run on another machine.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from pevlm_sglang.layout import full_pairs
from pevlm_sglang.tune.questions import is_url

SERVER_INFO_KEY = "pevlm"
"""Of PEVLM's configuration in ``/server_info``, and of its totals in each internal state there."""

_SHOWN = 500  # characters of a server's message
_WITHOUT_PEVLM = "the server runs without PEVLM; start it with --attention-backend pevlm"
_COUNTS = ("pairs_computed", "pairs_saved", "vision_runs")


class ServerError(ValueError):
    """The server cannot be reached, has no PEVLM, or refused a request; one line says which."""


@dataclass(frozen=True)
class Token:
    """A token of an answer: its bytes as UTF-8 (what is none by itself as surrogate escapes), its
    log-prob, and those of the likeliest tokens at its place, if they were asked for."""

    text: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """One answered request.

    Attributes:
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

    def since(self, before: Work) -> Work:
        return Work(
            **{name: getattr(self, name) - getattr(before, name) for name in _COUNTS},
            dense_tokens=dict(Counter(self.dense_tokens) - Counter(before.dense_tokens)),
        )


class Client:
    """Requests to one server, without the environment's proxies and without second tries. Every
    method raises ServerError where the server is not reachable or refuses.

    Args:
        url: of the server, such as ``http://localhost:30000``.
        timeout: seconds that the server may be silent in a request.
        embed_videos: send local files in the request (``data:`` URLs), for a server on another
            machine; otherwise the server opens the path itself.
        api_key: of a server that was started with ``--api-key``.

    Attributes:
        api: the OpenAI client of the same server, for requests of other forms.
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
        # Called before sending: a large video's JSON is not made under the clock.
        hooks = {"request": [lambda sent: sent.extensions.update(start=time.perf_counter())]}
        try:
            self.api = openai.OpenAI(
                base_url=f"{self.url}/v1",
                api_key=api_key or "",  # None would be the environment's
                max_retries=0,
                timeout=httpx.Timeout(timeout, connect=10.0),
                http_client=openai.DefaultHttpxClient(trust_env=False, event_hooks=hooks),
            )
        except httpx.InvalidURL as error:
            raise ServerError(f"{url}: expected a server's URL, got {error}") from None

    def ask(
        self,
        video: Path | str,
        question: str,
        *,
        setting: Mapping[str, Any] | None = None,
        max_tokens: int = 16,
        top_logprobs: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Ask about a video, with greedy decoding.

        Args:
            video: a local file, or an ``http:``, ``https:``, ``file:`` or ``data:`` URL.
            setting: PEVLM's options for this request; None leaves the server's own.
            top_logprobs: log-probs of this many likeliest tokens at every place, 0 of the answer's
                alone; None asks for no log-probs.
            sampling: of this video's frames, such as ``max_frames``.

        Raises:
            ServerError: see the class; also a stream without a token, or without usage.
            ValueError: the file cannot be read.
        """
        options: dict[str, Any] = {}
        if setting is not None:
            options["extra_body"] = {"custom_params": {"pevlm": dict(setting)}}
        if top_logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": top_logprobs}
        messages = about({"url": self._video_url(video), **(sampling or {})}, question)
        with (
            self._errors("/v1/chat/completions"),
            self.api.chat.completions.create(
                model="default",
                messages=messages,
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                **options,
            ) as stream,
        ):
            return self._read(stream)

    def measure(self, video: Path | str, question: str, **options: Any) -> tuple[Answer, Work]:
        """``ask`` on empty caches. On a server with other traffic, ``Work`` has its work too: see
        ``Work.is_whole_prompt``."""
        self.flush()
        before = self.counters()
        answer = self.ask(video, question, **options)
        return answer, self.counters().since(before)

    def flush(self) -> None:
        """Empty the caches of prefixes and, with PEVLM, of video embeddings, for which running
        requests may take 30 s to end."""
        path = "/flush_cache?timeout=30"
        with self._errors(path):
            self.api.post(self.url + path, cast_to=httpx.Response)

    def info(self) -> dict[str, Any]:
        """``/server_info``."""
        path = "/server_info"
        with self._errors(path):
            response = self.api.get(self.url + path, cast_to=httpx.Response)
        try:
            return {**response.json()}
        except (ValueError, TypeError):
            what = "expected a JSON object; is it SGLang?"
            raise ServerError(f"{self.url}{path}: {what}") from None

    def config(self) -> dict[str, Any]:
        """PEVLM's configuration on the server, with ``frames_per_step`` and ``base_backend``."""
        config = self.info().get(SERVER_INFO_KEY)
        if not isinstance(config, dict):
            raise ServerError(f"{self.url}: {_WITHOUT_PEVLM}")
        return config

    def counters(self) -> Work:
        """PEVLM's totals since the server's start."""
        states = self.info().get("internal_states") or []
        totals = [state[SERVER_INFO_KEY] for state in states if SERVER_INFO_KEY in state]
        if not totals or len(totals) < len(states):
            raise ServerError(f"{self.url}: {_WITHOUT_PEVLM}")
        return Work(
            **{name: sum(total[name] for total in totals) for name in _COUNTS},
            dense_tokens=sum((Counter(total["dense_tokens"]) for total in totals), Counter()),
        )

    def _video_url(self, video: Path | str) -> str:
        if isinstance(video, str) and is_url(video):
            return video
        path = Path(video).absolute()
        if not path.is_file():
            raise ValueError(f"{path}: expected a video file, got none")
        if not self.embed_videos:
            return path.as_uri()
        kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    def _read(self, stream: openai.Stream[Any]) -> Answer:
        ttft: float | None = None
        prompt_tokens, finish_reason = 0, ""
        text: list[str] = []
        tokens: list[Token] = []
        for event in stream:
            if event.usage:
                prompt_tokens = event.usage.prompt_tokens
            for choice in event.choices:
                piece = choice.delta.content or ""
                found = (choice.logprobs and choice.logprobs.content) or []
                finish_reason = choice.finish_reason or finish_reason
                # The first event holds the role alone. A token may decode to no text.
                if ttft is None and (piece or found or finish_reason):
                    ttft = time.perf_counter() - stream.response.request.extensions["start"]
                text.append(piece)
                tokens += map(_token, found)
        if ttft is None or not prompt_tokens or not finish_reason:
            raise ServerError(
                f"{self.url}: expected a streamed answer with usage and its end, got a stream that "
                "broke off; see the server's log"
            )
        whole = "".join(text)
        return Answer(whole, ttft, prompt_tokens, _spelling(whole, tokens), finish_reason)

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Whatever goes wrong with a request, in one line."""
        try:
            yield
        except openai.APIStatusError as error:
            what = f"expected HTTP 200, got {error.status_code}: {_message(error.body)}"
        except (openai.APIConnectionError, httpx.TransportError) as error:
            # Within a stream, httpx's own errors come through.
            cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
            what = "expected an answer of a running SGLang server, got "
            what += f"{type(cause).__name__}: {str(cause)[:_SHOWN]}"
            if isinstance(cause, httpx.ReadTimeout):
                what = f"the server was silent for {self.timeout:g} s; a longer timeout helps if it"
                what += " only works slowly"
        except openai.APIError as error:  # an event of a stream
            what = _message(error.body)
        else:
            return
        raise ServerError(f"{self.url}{path}: {what}")


def about(video: Mapping[str, Any], text: str) -> list[Any]:
    """The messages of a question about one video, of which ``video`` has the ``url`` and what the
    request wishes of the sampling; ``openai`` has no type for ``video_url``."""
    content = [{"type": "video_url", "video_url": video}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _token(found: Any) -> Token:
    def text(token: Any) -> str:  # from the bytes: that of half a character is one for all of them
        if token.bytes is None:
            return str(token.token)
        return bytes(token.bytes).decode("utf-8", errors="surrogateescape")

    likeliest_last = reversed(found.top_logprobs or [])
    return Token(text(found), found.logprob, {text(one): one.logprob for one in likeliest_last})


def _spelling(text: str, tokens: Iterable[Token]) -> tuple[Token, ...]:
    """The tokens that spell the beginning of a text. SGLang streams log-probs with text: those of a
    token without any, such as half a character, are lost, or come with what follows; from there on,
    a token's place is not known."""
    whole, place, spelt = text.encode(errors="surrogatepass"), 0, []
    for token in tokens:
        piece = token.text.encode(errors="surrogateescape")
        if not piece or not whole.startswith(piece, place):
            break
        spelt.append(token)
        place += len(piece)
    return tuple(spelt)


def _message(answer: Any) -> str:
    """The server's own words in an error."""
    while isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or json.dumps(answer)
    return " ".join(str(answer).split())[:_SHOWN] or "no message"
