"""The paper's accuracy table from lmms-eval: full attention beside PEVLM, on the same server.

    python benchmarks/lmms/run.py --model Qwen/Qwen2.5-VL-7B-Instruct --benchmarks videomme \\
        --client .lmms-eval/bin/python -- --chunked-prefill-size 16384

Method. What follows ``--`` are SGLang's flags. The script starts a server twice with them, once
with PEVLM off by default (``--pevlm-enabled false``: the same base backend, video and vision
tower) and once with PEVLM, and runs lmms-eval itself against each, a benchmark at a time;
``--route`` says how it sends a video. The attention pairs of each benchmark are read from
``/server_info`` before and after. The script fails if full attention saved a pair, PEVLM saved
none, a request failed (for which lmms-eval would score its error message), or the methods answered
different questions. Nobody else may use the server meanwhile.

Sample output: see README.md beside this file. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # `support` lives there
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lmms import routes
from lmms.columns import BENCHMARKS, PAPER
from lmms.table import (
    METHODS,
    RUN,
    RunError,
    as_json,
    check_counters,
    collect,
    read_samples,
    render,
)

from support.server import DEFAULT_ENV, DEFAULT_FLAGS, Server

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / ".cache" / "lmms" / "results"
LOG_TAIL = 3000  # characters of lmms-eval's log in an error
STARTUP = 1800.0  # seconds: a large model may be downloaded first

Info = dict[str, Any]
"""``/server_info``."""


@dataclass(frozen=True)
class Target:
    """What lmms-eval is pointed at.

    Attributes:
        arguments: lmms-eval's ``--model_args``.
        info: asks for ``/server_info``; in lmms-eval's own process, what the Engine left.
        server: None where the Engine lives in lmms-eval's process.
    """

    arguments: str
    info: Callable[[], Info]
    server: Server | None = None

    def fresh(self) -> dict[str, int]:
        """The counters before a benchmark, which finds no video of another one cached."""
        if self.server is None:
            return {}
        flushed = self.server.post("/flush_cache?timeout=30")
        if flushed.status_code != 200:
            raise RunError(f"/flush_cache: expected HTTP 200, got {flushed.status_code}")
        return counters(self.info())


def counters(info: Info) -> dict[str, int]:
    """PEVLM's totals, summed over the schedulers, with the reasons of dense tokens beside them.

    Raises:
        RunError: the server runs without the plugin.
    """
    summed: dict[str, int] = {}
    for state in info["internal_states"]:
        if "pevlm" not in state:
            raise RunError("expected PEVLM's totals in /server_info, got none; is it installed?")
        totals = state["pevlm"]
        flat = {name: totals[name] for name in ("pairs_computed", "pairs_saved", "sparse_tokens")}
        for name, count in (flat | totals["dense_tokens"]).items():
            summed[name] = summed.get(name, 0) + count
    return summed


def evaluate(options: argparse.Namespace, method: str, name: str, target: Target) -> None:
    """Run lmms-eval on one benchmark and leave its logs and ``run.json`` in the results."""
    output: Path = options.results / method / name
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    before = target.fresh()
    arguments = target.arguments
    if options.client_args:
        arguments += f",{options.client_args}"  # lmms-eval takes the last of a name
    command = routes.command(
        options.route,
        options.client,
        BENCHMARKS[name].tasks,
        output,
        arguments=arguments,
        concurrency=options.concurrency,
        limit=options.limit,
    )
    print(f"{METHODS[method]}, {name}: {' '.join(command)}", flush=True)
    with (output / "lmms_eval.log").open("w") as log:
        done = subprocess.run(
            command, cwd=options.cwd, env=client_env(options), stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        tail = (output / "lmms_eval.log").read_text()[-LOG_TAIL:]
        raise RunError(
            f"lmms-eval: expected status 0, got {done.returncode}; its log ends:\n{tail}"
        )
    read_samples(output, BENCHMARKS[name])  # lest an error is found only hours later
    after = target.info()
    counted = {key: count - before.get(key, 0) for key, count in counters(after).items()}
    check_counters(method, name, counted)
    config = {key: value for key, value in after["pevlm"].items() if key != "enabled"}
    run = {
        "route": options.route,
        "launch": options.launch,
        "client": options.client_args,
        "limit": options.limit,
        "model": after["model_path"],
        "pevlm": config,
        "versions": {"sglang": after["version"], "lmms-eval": options.lmms_eval},
        "counters": counted,
    }
    (output / RUN).write_text(json.dumps(run, indent=1) + "\n")


def client_env(options: argparse.Namespace) -> dict[str, str]:
    """lmms-eval's environment."""
    env = dict(os.environ)
    if options.route == routes.IN_PROCESS:
        env |= DEFAULT_ENV if options.cpu else {}
        env["PEVLM_SERVER_INFO"] = str(options.results / "server_info.json")
    return env


@contextmanager
def serving(options: argparse.Namespace, method: str) -> Iterator[Target]:
    """A server of the method while the block lasts, or the Engine's arguments."""
    added = routes.server_flags(options.route, method)
    if options.route == routes.IN_PROCESS:
        left: Path = options.results / "server_info.json"
        left.unlink(missing_ok=True)
        flags = [*(DEFAULT_FLAGS if options.cpu else ()), *options.launch, *added]
        engine = {"model": options.model, **routes.engine_arguments(flags)}
        yield Target(routes.model_args(engine), lambda: dict(json.loads(left.read_text())))
        return
    log = options.results / f"server-{method}.log"
    print(f"{METHODS[method]}: starting the server (log: {log})", flush=True)
    with Server(
        options.model,
        *(*options.launch, *added),
        log_path=log,
        on_cpu=options.cpu,
        startup_timeout=STARTUP,
    ) as server:
        client = routes.server_arguments(options.route, server.url, options.concurrency)
        yield Target(routes.model_args(client), server.info, server)


def installed(python: str) -> str:
    """lmms-eval's version in an environment; its own log says "unknown" of a release.

    Raises:
        RunError: it is not there.
    """
    asked = "from importlib.metadata import version; print(version('lmms-eval'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True)
    if done.returncode:
        raise RunError(
            f"--client {python}: expected an environment with lmms-eval, got none; "
            "README.md beside this file says how to make one"
        )
    return done.stdout.strip()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The script's options, with SGLang's flags as ``launch``."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s --model MODEL [options] [-- SGLang's flags]",
    )
    parser.add_argument("--model", required=True, help="SGLang's --model-path")
    parser.add_argument(
        "--benchmarks", nargs="+", choices=BENCHMARKS, default=PAPER, help="default: the paper's"
    )
    parser.add_argument("--route", choices=routes.ROUTES, default=routes.VIDEO)
    parser.add_argument(
        "--client", default=sys.executable, help="Python of the environment with lmms-eval"
    )
    parser.add_argument(
        "--client-args", default="", help="more of lmms-eval's --model_args: name=value,name=value"
    )
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once")
    parser.add_argument("--limit", type=int, help="questions a task (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what is logged, kept")
    parser.add_argument(
        "--cwd", type=Path, default=ROOT, help="where lmms-eval runs (default: the repository)"
    )
    parser.add_argument("--cpu", action="store_true", help="for a machine without a GPU")
    options = parser.parse_args(arguments[:split])
    options.launch = arguments[split + 1 :]
    options.results = options.results.resolve()
    if Path(options.model).exists():  # or it is a name, which SGLang resolves
        options.model = str(Path(options.model).resolve())
    if "made_videos" in options.benchmarks and not (options.cwd / ".cache/lmms/videos").exists():
        parser.error(
            "made_videos: expected .cache/lmms/videos, got none; make it with python "
            "benchmarks/accuracy/dataset.py .cache/lmms/videos --videos 3 --scenes 32 48"
        )
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    options.results.mkdir(parents=True, exist_ok=True)
    try:
        options.lmms_eval = installed(options.client)
        for method in METHODS:
            with serving(options, method) as target:
                for name in options.benchmarks:
                    evaluate(options, method, name, target)
        columns, common = collect(options.results)
    except RunError as error:
        sys.exit(f"run: {error}")
    print("\n" + render(columns) + "\n\n" + as_json(columns, common))


if __name__ == "__main__":
    main()
