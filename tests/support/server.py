"""A real SGLang server as a subprocess, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

DEFAULT_FLAGS = (
    *("--device", "cpu"),
    *("--dtype", "float32"),
    *("--mem-fraction-static", "0.3"),
    *("--max-total-tokens", "40000"),
    "--sleep-on-idle",  # or the scheduler spins on a core that the client needs
)
COMMANDS = {
    "launch_server": (sys.executable, "-m", "sglang.launch_server"),
    "serve": (str(Path(sys.executable).with_name("sglang")), "serve"),
}
DEFAULT_ENV = {
    "SGLANG_PLATFORM": "pevlm_cpu",
    "HF_HUB_OFFLINE": "1",
    # Threads that spin at a barrier starve whatever shares a small machine with them.
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch.compile on the CPU wants a C++ compiler, and seconds of each new shape.
    "TORCHDYNAMO_DISABLE": "1",
}
LOG_TAIL = 4000  # characters of the log in an error
STOP_TIMEOUT = 10.0  # seconds for a clean exit, before the process group is killed
KILL_TIMEOUT = 3.0  # seconds for the killed group to vanish; in a container without init it stays


class Server:
    """``python -m sglang.launch_server`` on a loopback port, ended with the ``with`` block.

    Example:
        with Server(model, "--attention-backend", "pevlm") as server:
            answer = server.chat("What happens in the video?", max_tokens=8)

    Attributes:
        url: of the server, without a path.
    """

    def __init__(
        self,
        model: Path | str,
        *flags: str,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        startup_timeout: float = 240.0,
        port: int | None = None,
        command: str = "launch_server",
        on_cpu: bool = True,
    ) -> None:
        """
        Args:
            model: directory of the model, or a name that SGLang resolves.
            flags: of ``sglang.launch_server``; they take precedence over ``DEFAULT_FLAGS``.
            env: variables on top of this process's own and ``DEFAULT_ENV``.
            log_path: where stdout and stderr go; None is a file that goes with the server.
            startup_timeout: seconds until the server must be ready.
            port: None takes a free one.
            command: ``launch_server`` (``python -m sglang.launch_server``) or ``serve``
                (``sglang serve``).
            on_cpu: False leaves out ``DEFAULT_FLAGS`` and ``DEFAULT_ENV``.
        """
        self._port = port or _free_port()
        self._log_is_temporary = log_path is None
        if log_path is None:
            handle, name = tempfile.mkstemp(prefix="sglang-", suffix=".log")
            os.close(handle)
            log_path = Path(name)
        self._log_path = Path(log_path)
        self._startup_timeout = startup_timeout
        self._command = [
            *COMMANDS[command],
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--model-path", str(model)),
            *(DEFAULT_FLAGS if on_cpu else ()),
            *flags,
        ]
        self._env = {
            **os.environ,
            **(DEFAULT_ENV if on_cpu else {}),
            **(env or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the environment is not for the loopback
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, to be ended as one
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def pid(self) -> int:
        """Of the launcher."""
        assert self._process is not None
        return self._process.pid

    def get(self, path: str, timeout: float = 60.0) -> requests.Response:
        """GET a path; the status is the caller's to judge."""
        return self._session.get(self.url + path, timeout=timeout)

    def post(
        self, path: str, json: Mapping[str, Any] | None = None, timeout: float = 600.0
    ) -> requests.Response:
        """POST JSON to a path; the status is the caller's to judge."""
        return self._session.post(self.url + path, json=json, timeout=timeout)

    def post_text(self, path: str, body: str) -> requests.Response:
        """POST a body as it stands, JSON or not; the status is the caller's to judge."""
        headers = {"Content-Type": "application/json"}
        return self._session.post(self.url + path, data=body, headers=headers, timeout=60.0)

    def chat(self, content: str | list[dict[str, Any]], **body: Any) -> dict[str, Any]:
        """One user message through ``/v1/chat/completions``; ``body`` replaces the defaults.

        Raises:
            RuntimeError: an answer other than HTTP 200.
        """
        messages = [{"role": "user", "content": content}]
        return self._json(
            self.post(
                "/v1/chat/completions",
                {
                    "model": "tiny",
                    "messages": messages,
                    "temperature": 0,
                    "max_tokens": 8,  # a random model hardly ever ends by itself
                    **body,
                },
            )
        )

    def generate(self, **body: Any) -> dict[str, Any]:
        """SGLang's own ``/generate``.

        Raises:
            RuntimeError: an answer other than HTTP 200.
        """
        return self._json(self.post("/generate", body))

    def generate_batch(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``/generate`` with a list a field, one entry a request.

        Raises:
            RuntimeError: an answer other than HTTP 200.
        """
        answers: list[dict[str, Any]] = self._checked(self.post("/generate", body)).json()
        return answers

    def info(self) -> dict[str, Any]:
        """``/server_info``, with ``internal_states``."""
        return self._json(self.get("/server_info"))

    def metrics(self) -> str:
        """``/metrics`` in Prometheus' text format; needs the flag ``--enable-metrics``."""
        return self._checked(self.get("/metrics")).text

    def log(self) -> str:
        """Everything that the server has written so far."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def alive(self) -> bool:
        """Whether the server process runs and answers ``/health``."""
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            return self.get("/health", timeout=5.0).status_code == 200
        except requests.RequestException:
            return False

    def _json(self, response: requests.Response) -> dict[str, Any]:
        answer: dict[str, Any] = self._checked(response).json()
        return answer

    def _checked(self, response: requests.Response) -> requests.Response:
        if response.status_code != 200:
            raise RuntimeError(
                f"{response.request.method} {response.url}: expected HTTP 200, "
                f"got {response.status_code}: {response.text[:LOG_TAIL]}"
            )
        return response

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._startup_timeout
        while time.monotonic() < deadline:
            code = self._process.poll()
            if code is not None:
                raise RuntimeError(self._failure(f"exited with status {code} while starting"))
            if self.alive():
                return
            time.sleep(0.25)
        raise RuntimeError(self._failure(f"was not ready after {self._startup_timeout:g} s"))

    def _failure(self, what: str) -> str:
        return (
            f"the SGLang server {what}\ncommand: {' '.join(self._command)}\n"
            f"end of its log:\n{self.log()[-LOG_TAIL:]}"
        )

    def _close(self) -> None:
        """End every process of the server's group; ``log()`` stays readable if it has a path."""
        self._session.close()
        process, self._process = self._process, None
        if process is not None:
            process.terminate()  # the launcher ends and collects its own children
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT)
            _kill_group(process)
        if self._log_is_temporary:
            self._log_path.unlink(missing_ok=True)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process group, and wait until init has collected it."""
    deadline = time.monotonic() + KILL_TIMEOUT
    with contextlib.suppress(ProcessLookupError):  # the group is gone
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
