"""How lmms-eval reaches SGLang: three routes, as its ``--model`` and ``--model_args``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
CLIENT = Path(__file__).parent / "client.py"

FRAMES, VIDEO, IN_PROCESS = "frames", "video", "engine"
ROUTES = {
    FRAMES: "its OpenAI client reads the video and sends the frames as images",
    VIDEO: "its OpenAI client sends the path as a video_url, and the server reads the video",
    IN_PROCESS: "its sglang model: SGLang's Engine in the process of lmms-eval, no server",
}
CLIENTS = {FRAMES: "async_openai", VIDEO: "openai", IN_PROCESS: "sglang"}

# Of SGLang's flags, those that lmms-eval's `sglang` model names otherwise or sets by itself.
RENAMED = {
    "tp": "tensor_parallel_size",
    "tp_size": "tensor_parallel_size",
    "mem_fraction_static": "gpu_memory_utilization",
}


def server_flags(route: str, method: str) -> list[str]:
    """What the method and the route add to SGLang's flags."""
    flags = ["--attention-backend", "pevlm"]
    if route == FRAMES:
        flags.append("--pevlm-image-runs")
    if method == "full":
        # The same server otherwise: the same base backend, video and vision tower.
        flags += ["--pevlm-enabled", "false"]
    return flags


def engine_arguments(flags: Sequence[str]) -> dict[str, str]:
    """SGLang's flags as the keyword arguments of ``sglang.Engine``.

    Raises:
        ValueError: something that is no flag where one is expected.
    """
    arguments: dict[str, str] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"SGLang's flags: expected --name, got {flag}")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        name = name.replace("-", "_")
        arguments[RENAMED.get(name, name)] = value
    return arguments


def model_args(arguments: dict[str, Any]) -> str:
    """As lmms-eval parses them.

    Raises:
        ValueError: a value with a comma outside of braces, brackets and quotes.
    """
    for name, value in arguments.items():
        text = str(value)
        if "," in text and text[0] + text[-1] not in ("{}", "[]", '""'):
            raise ValueError(f"{name}: expected a value without a comma, got {text}")
    return ",".join(f"{name}={value}" for name, value in arguments.items())


def command(
    route: str,
    python: str,
    tasks: Sequence[str],
    output: Path,
    *,
    arguments: str,
    concurrency: int,
    limit: int | None,
) -> list[str]:
    """lmms-eval's command line.

    Args:
        python: interpreter of the environment that has lmms-eval.
        arguments: of the model, by ``model_args``.
        concurrency: requests at once.
        limit: questions a task; None is all.
    """
    return [
        *(python, str(CLIENT)),
        *("--model", CLIENTS[route], "--model_args", arguments),
        *("--tasks", ",".join(tasks), "--include_path", str(TASKS)),
        *("--batch_size", str(concurrency if route == IN_PROCESS else 1)),
        *("--log_samples", "--output_path", str(output)),
        *(("--limit", str(limit)) if limit else ()),
    ]


def server_arguments(route: str, url: str, concurrency: int) -> dict[str, Any]:
    """Arguments of lmms-eval's OpenAI clients, for a server at ``url``."""
    arguments: dict[str, Any] = {"model": "default", "base_url": f"{url}/v1", "api_key": "none"}
    if route == FRAMES:
        return arguments | {"num_cpus": concurrency}  # its name for requests at once
    return arguments | {
        "pass_video_url": True,
        "num_concurrent": concurrency,
        "httpx_trust_env": False,
    }
