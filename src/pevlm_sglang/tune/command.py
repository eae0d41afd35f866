"""``pevlm tune``: its flags, and what runs behind them."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from pevlm_sglang.tools.options import REQUIRED, add_command, add_options, count, quantile, seconds

API_KEY_VARIABLE = "PEVLM_API_KEY"
NONE_WITHIN_LIMIT = 3
INTERRUPTED = 130
"""Exit codes."""

_SUMMARY = "the best setting for your own questions within a latency limit"
_DESCRIPTION = """Ask a running server your own questions under many settings of PEVLM and under
full attention, and recommend a setting for a limit on the time to first token.

QUESTIONS.jsonl has a line a question:

  {"video": "drive.mp4", "question": "Who brakes first?", "answer": "the van"}

video is a path relative to the file, or a URL; other keys are ignored. With answers, settings are
ranked by accuracy (an exact match but for case, white space and punctuation around it; for multiple
choice, "B", "(B)", "B." and "B. two cars" are the same). Without any, by agreement: how often the
greedy answer is full attention's own, beside the difference of the log-probs of its tokens.

The server is one of your model with --attention-backend pevlm. Settings are chosen per request, so
it is not restarted. So that the time to first token is that of a new video, its caches are flushed
before every request, and it must have no other traffic."""

_EXAMPLES = f"""examples:
  pevlm tune questions.jsonl --latency 2.0
  pevlm tune questions.jsonl --latency 0.5 --quantile 0.5 --sink-frames 0 2 4 --block-frames 8 16
  pevlm tune clips.jsonl --latency 2.0 --url http://gpu-box:30000 --embed-videos --output clips

writes into --output: measurements.jsonl (the same command goes on from there, also with more
questions, other sizes or another limit), server.json, results.json, plot.png, and preset.yaml for
--pevlm-config.

exit codes: 0; 2 for an error; {NONE_WITHIN_LIMIT} if no setting is within the limit;
{INTERRUPTED} after Ctrl-C."""


def add_parser(commands: Any) -> None:
    """Add ``tune`` to the subcommands of ``pevlm``."""
    parser = add_command(
        commands, "tune", run, _SUMMARY, description=_DESCRIPTION, epilog=_EXAMPLES
    )
    parser.add_argument("questions", type=Path, metavar="QUESTIONS.jsonl")
    latency = "limit on the time to first token, seen from here"
    within = "of the questions' times that must be within the limit"
    png = "fail at once if matplotlib, which draws plot.png, is not installed"
    add_options(
        parser,
        ("latency", seconds, "SECONDS", REQUIRED, latency),
        ("quantile", quantile, "Q", 0.9, within),
        ("output", Path, "DIR", Path("pevlm-tune"), "for everything that is written"),
        ("sink_frames", int, "N", (0, 2, 4, 8, 16), "sizes to try"),
        ("block_frames", int, "N", (4, 8, 16), "sizes to try"),
        ("max_tokens", count, "N", 32, "most tokens of an answer"),
        ("png", bool, "", False, png),
    )
    server = parser.add_argument_group(
        "server", f"Its API key, if it has one, is read from ${API_KEY_VARIABLE}."
    )
    embed = (
        "send video files in the requests, for a server on another machine; sending them is then "
    )
    embed += "part of the time to first token"
    add_options(
        server,
        ("url", str, "URL", "http://localhost:30000", "where it is"),
        ("timeout", seconds, "SECONDS", 600.0, "that it may be silent"),
        ("embed_videos", bool, "", False, embed),
    )


def run(arguments: Namespace) -> int:
    """Measure what is missing, and report.

    Returns:
        The exit code.

    Raises:
        ValueError: bad input, or the server's errors.
    """
    from pevlm_sglang.tools import picture  # what these import need not be waited for elsewhere
    from pevlm_sglang.tune import measurements, questions
    from pevlm_sglang.tune.client import Client
    from pevlm_sglang.tune.report import write_report
    from pevlm_sglang.tune.results import Limit, evaluate

    if arguments.png and not picture.available():
        raise ValueError(f"--png: {picture.MISSING}")
    asked = questions.load(arguments.questions)
    embed, most = arguments.embed_videos, arguments.max_tokens
    key = os.environ.get(API_KEY_VARIABLE)
    client = Client(arguments.url, arguments.timeout, embed_videos=embed, api_key=key)
    steps = client.config()["frames_per_step"]
    settings = measurements.make_settings(arguments.sink_frames, arguments.block_frames, steps)
    server = measurements.describe_server(client.info(), most, embed_videos=embed)
    command, output = shlex.join(["pevlm", *arguments.argv]), arguments.output
    total = len(asked) * len(settings)
    with measurements.open_measurements(output, server) as measured:

        def state() -> str:
            left = len(measured.missing(asked, settings))
            return f"{total - left} of {total} measurements are in {output}"

        print(f"{len(asked)} questions under {len(settings)} settings: {state()}", flush=True)
        try:
            todo = measured.missing(asked, settings)
            measurements.sweep(client, todo, measured, total=total, max_tokens=most)
        except ValueError as error:
            raise ValueError(f"{error}\n{state()}; to go on: {command}") from None
        except KeyboardInterrupt:
            print(f"\npevlm: interrupted; {state()}; to go on: {command}", file=sys.stderr)
            return INTERRUPTED
        evaluation = evaluate(asked, settings, measured.done)
    limit = Limit(arguments.latency, arguments.quantile)
    found = write_report(evaluation, limit, output, command=command, server=server)
    return 0 if found.best else NONE_WITHIN_LIMIT
