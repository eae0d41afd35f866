"""``pevlm tune``: its flags, and what runs behind them."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that the other commands need not wait for what these import
    from pevlm_sglang.tune.results import Evaluation, Limit


API_KEY_VARIABLE = "PEVLM_API_KEY"
RESULTS_FILE = "results.json"
NONE_WITHIN_LIMIT = 3
INTERRUPTED = 130
"""Exit codes."""

_DESCRIPTION = """Ask a running server your own questions under many settings of PEVLM and under
full attention, and recommend a setting for a limit on the time to first token.

QUESTIONS.jsonl has a line a question:

  {"video": "drive.mp4", "question": "Who brakes first?", "answer": "the van"}

video is a path relative to the file, or a URL; other keys are ignored. With answers, settings are
ranked by accuracy (an exact match but for case, white space and punctuation around it; for multiple
choice, "B", "(B)", "B." and "B. two cars" are the same). Without any, by agreement: how often the
greedy answer is full attention's own, beside the difference of the log-probs of its tokens.

The server is one of your model with --attention-backend pevlm. Settings are chosen per request, so
it is not restarted. So that the time to first token is that of a new video, the prefix cache is
flushed before every request, the server must have no other traffic, and must run with
SGLANG_VLM_CACHE_SIZE_MB=0 in its environment (SGLang cannot flush that cache)."""

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
    parser = commands.add_parser(
        "tune",
        help="the best setting for your own questions within a latency limit",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("questions", type=Path, metavar="QUESTIONS.jsonl")
    parser.add_argument(
        "--latency",
        type=_positive,
        required=True,
        metavar="SECONDS",
        help="limit on the time to first token, seen from here",
    )
    parser.add_argument(
        "--quantile",
        type=_quantile,
        default=0.9,
        metavar="Q",
        help="of the questions' times that must be within the limit (default: %(default)g)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("pevlm-tune"),
        metavar="DIR",
        help="for everything that is written (default: %(default)s)",
    )
    for name, sizes in (("sink_frames", (0, 2, 4, 8, 16)), ("block_frames", (4, 8, 16))):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            nargs="+",
            default=sizes,
            metavar="N",
            help=f"sizes to try (default: {' '.join(map(str, sizes))})",
        )
    parser.add_argument(
        "--max-tokens",
        type=_count,
        default=32,
        metavar="N",
        help="most tokens of an answer (default: %(default)d)",
    )
    parser.add_argument(
        "--png",
        action="store_true",
        help="fail at once if matplotlib, which draws plot.png, is not installed",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://localhost:30000", help="(default: %(default)s)")
    server.add_argument(
        "--embed-videos",
        action="store_true",
        help="send video files in the requests, for a server on another machine; sending them is "
        "then part of the time to first token",
    )
    server.add_argument(
        "--timeout",
        type=_positive,
        default=600.0,
        metavar="SECONDS",
        help="that the server may be silent (default: %(default)g); its API key, if it has one, is "
        f"read from ${API_KEY_VARIABLE}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure what is missing, and report.

    Returns:
        The exit code.

    Raises:
        ValueError: bad input, or the server's errors.
    """
    from pevlm_sglang.tune import plot, questions, sweep
    from pevlm_sglang.tune.client import Client
    from pevlm_sglang.tune.measurements import open_measurements
    from pevlm_sglang.tune.results import Limit, evaluate

    if arguments.png and not plot.available():
        raise ValueError(f"--png: {plot.MISSING}")
    asked = questions.load(arguments.questions)
    client = Client(
        arguments.url,
        arguments.timeout,
        embed_videos=arguments.embed_videos,
        api_key=os.environ.get(API_KEY_VARIABLE),
    )
    steps = client.config()["frames_per_step"]
    settings = sweep.make_settings(arguments.sink_frames, arguments.block_frames, steps)
    server = sweep.describe_server(
        client.info(), arguments.max_tokens, embed_videos=arguments.embed_videos
    )
    command = shlex.join(["pevlm", *arguments.argv])
    output: Path = arguments.output
    with open_measurements(output, server) as measured:
        total = len(asked) * len(settings)
        todo = sweep.pending(asked, settings, measured)
        print(
            f"{len(asked)} questions under {len(settings)} settings: {total - len(todo)} of "
            f"{total} measurements are in {output}",
            flush=True,
        )
        try:
            sweep.sweep(client, todo, measured, total=total, max_tokens=arguments.max_tokens)
        except (KeyboardInterrupt, ValueError) as error:
            left = len(sweep.pending(asked, settings, measured))
            kept = f"{total - left} of {total} measurements are in {output}; to go on: {command}"
            if isinstance(error, ValueError):
                raise ValueError(f"{error}\n{kept}") from None
            print(f"\npevlm: interrupted; {kept}", file=sys.stderr)
            return INTERRUPTED
        evaluation = evaluate(asked, settings, measured.done)
    return _report(
        evaluation, Limit(arguments.latency, arguments.quantile), output, command, server
    )


def _report(
    evaluation: Evaluation, limit: Limit, output: Path, command: str, server: dict[str, Any]
) -> int:
    """Print and write what was found."""
    from pevlm_sglang.tune import plot, report
    from pevlm_sglang.tune.results import recommend

    preset_file, plot_file = output / report.PRESET_FILE, output / plot.PLOT_FILE
    for earlier in (preset_file, plot_file, output / RESULTS_FILE):  # of another limit
        earlier.unlink(missing_ok=True)
    figures = report.table(evaluation, limit)
    print(f"\n{figures}\n")
    found = recommend(evaluation, limit)
    best = found.best
    verdict, warnings = report.verdict(limit, found), report.warnings(evaluation, found)
    content = {
        "command": command,
        "server": server,
        "limit": vars(limit),
        "questions": len(evaluation.videos),
        "videos": evaluation.num_videos,
        "results": [result.describe(limit.quantile) for result in evaluation.results],
        "recommended": best.setting.options if best else None,
        "nearest": found.nearest.setting.options,
        "indistinguishable": [rival.setting.options for rival in found.rivals],
        "warnings": warnings,
    }
    (output / RESULTS_FILE).write_text(json.dumps(content, indent=2) + "\n")
    if plot.available():
        plot.draw_plot(evaluation.results, best, limit, plot_file)
        print(f"plot: {plot_file}")
    else:
        print(f"no plot: {plot.MISSING}")
    for warning in warnings:
        print(f"warning: {warning}")
    print(verdict)
    if best is None:
        return NONE_WITHIN_LIMIT
    text = "\n".join([figures, "", verdict, *(f"warning: {warning}" for warning in warnings)])
    report.write_preset(preset_file, best.setting, command=command, figures=text, server=server)
    print(f"preset: {preset_file}")
    return 0


def _positive(text: str) -> float:
    return _number(text, lambda value: 0 < value < math.inf, "a number of seconds above 0")


def _quantile(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "a number above 0, up to 1")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _number(text: str, holds: Any, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
