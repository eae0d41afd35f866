"""The command line: ``pevlm show`` and ``pevlm tune``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pevlm_sglang.families import registry
from pevlm_sglang.settings.config import PevlmConfig, preset_names, resolve
from pevlm_sglang.tools.options import add_command, add_options
from pevlm_sglang.tools.show import Model, Prompt, Request, as_json, as_text
from pevlm_sglang.tune import command as tune

_SAME_NAME = ("duration", "video_fps", "prompt_tokens", "question_tokens")  # here and in Request
_DEFAULT_FAMILY = "qwen2_5_vl"

_SUMMARY = "the layout of a video, its token counts and its cost"
_SHOW = """Show what a video becomes on an SGLang server: sampled frames, tokens, sink, context
blocks, and what attention then costs. Needs no GPU, no server and no weights."""

_EXAMPLES = """examples:
  pevlm show --frames 768 --size 1280x720
  pevlm show low-latency --duration 384 --model-family qwen3_vl
  pevlm show MODEL_DIR --config low-latency --duration 600 --fps 1 --json
  pevlm show --frames 24 --size 448x224 --sink-frames 4 --block-frames 4 --png mask.png

precedence: defaults < preset or --config < --sink-frames, --block-frames"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 2 for what the user can mend, with one line on stderr; ``tune`` has
        more.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="pevlm", description="Tools of PEVLM for SGLang.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_show(commands)
    tune.add_parser(commands)
    arguments = parser.parse_args(argv, argparse.Namespace(argv=argv))
    try:
        code: int = arguments.run(arguments)
    except ValueError as error:
        print(f"pevlm: {error}", file=sys.stderr)
        return 2
    return code


def _add_show(commands: Any) -> None:
    parser = add_command(commands, "show", _show, _SUMMARY, description=_SHOW, epilog=_EXAMPLES)
    parser.add_argument(
        "source",
        nargs="?",
        metavar="MODEL_DIR|PRESET",
        help="directory of a checkpoint (config.json and the processor's files), or a preset "
        f"({', '.join(preset_names())}, or a YAML file), which is then laid out for the published "
        "checkpoints of --model-family",
    )
    parser.add_argument(
        "--model-family",
        choices=tuple(registry.published()),
        help="without MODEL_DIR: take the published checkpoints of this family "
        f"(default: {_DEFAULT_FAMILY})",
    )
    add_options(
        parser,
        ("config", str, "PRESET|FILE", None, "preset, beside a MODEL_DIR"),
        ("png", Path, "FILE", None, "also draw the mask"),
        ("json", bool, "", False, "print one JSON object"),
    )
    video = parser.add_argument_group("video")
    add_options(
        video.add_mutually_exclusive_group(required=True),
        ("frames", int, "N", None, "sampled frames"),
        ("duration", float, "SECONDS", None, "length of the video"),
    )
    config = (
        """what the server gets under this name, such as '{"video": {"fps": 1, "max_pixels": """
    )
    config += """401408}}'; of "video", these take effect: """ + ", ".join(registry.setting_names())
    short = "short for this setting: "
    add_options(
        video,
        ("size", _size, "WxH", "1280x720", "of the video, in pixels"),
        ("video_fps", float, "FPS", Request.video_fps, "frame rate of the file, with --duration"),
        ("mm_process_config", _video_settings, "JSON", "{}", config),
        ("fps", float, "N", None, short + "frames sampled from a second of video"),
        ("max_frames", int, "N", None, short + "most frames sampled from a video"),
    )
    layout = [
        (name, int, "N", None, PevlmConfig.help(name)) for name in ("sink_frames", "block_frames")
    ]
    before = "tokens of the system prompt and of text before the video"
    before += " (default: the chat template's own system prompt)"
    after = "tokens of the text after the video"
    add_options(
        parser.add_argument_group("layout"),
        *layout,
        ("prompt_tokens", int, "N", None, before),
        ("question_tokens", int, "N", Request.question_tokens, after),
    )


def _show(arguments: argparse.Namespace) -> int:
    model, preset = _model_and_preset(arguments)
    config = resolve(preset, _given(arguments, "sink_frames", "block_frames"), prefix="")
    request = Request(
        size=arguments.size,
        settings={**arguments.mm_process_config, **_given(arguments, "fps", "max_frames")},
        sampled=arguments.frames,
        **{name: getattr(arguments, name) for name in _SAME_NAME},
    )
    prompt = Prompt(model, config, request)
    if arguments.png is not None:
        from pevlm_sglang.tools.picture import draw_png

        draw_png(prompt, arguments.png)
    print(as_json(prompt) if arguments.json else as_text(prompt))
    return 0


def _model_and_preset(arguments: argparse.Namespace) -> tuple[Model, str | None]:
    source, preset, family = arguments.source, arguments.config, arguments.model_family
    if source is not None and (source in preset_names() or source.endswith((".yaml", ".yml"))):
        if preset is not None:
            raise ValueError(f"--config {preset}: expected one preset, got {source} too")
        source, preset = None, source
    if source is None:
        family = family or _DEFAULT_FAMILY
        return Model(f"published {family}", registry.published()[family]), preset
    if family is not None:
        raise ValueError(f"--model-family: {source}/config.json names the family; leave it out")
    if not Path(source).is_dir():
        raise ValueError(
            f"{source}: expected the directory of a checkpoint or a preset "
            f"({', '.join(preset_names())}, or a YAML file); for a published checkpoint, leave it "
            "out"
        )
    return Model(str(Path(source)), registry.of_checkpoint(Path(source))), preset


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 1280x720, got {text!r}")
    return int(width), int(height)


def _video_settings(text: str) -> dict[str, Any]:
    try:
        video = json.loads(text).get("video", {})
    except (ValueError, AttributeError):
        video = None
    if not isinstance(video, dict):
        raise argparse.ArgumentTypeError(f"""expected '{{"video": {{...}}}}', got {text!r}""")
    return video
