"""The command line: ``pevlm show`` and ``pevlm tune``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pevlm_sglang.families import registry
from pevlm_sglang.settings.config import PevlmConfig, preset_names, resolve
from pevlm_sglang.tools.show import Model, Prompt, Request, as_json, as_text
from pevlm_sglang.tune import command as tune

_PRESET_SUFFIXES = (".yaml", ".yml")
_DEFAULT_SIZE = (1280, 720)
_DEFAULT_FAMILY = "qwen2_5_vl"

_SHOW = """Show what a video becomes on an SGLang server: sampled frames, tokens, sink, context
blocks, and what attention then costs. Needs no GPU, no server and no weights."""

_SHOW_EXAMPLES = """examples:
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
    parser = commands.add_parser(
        "show",
        help="the layout of a video, its token counts and its cost",
        description=_SHOW,
        epilog=_SHOW_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_show)
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
    parser.add_argument("--config", metavar="PRESET|FILE", help="preset, beside a MODEL_DIR")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the mask")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_video(parser)
    _add_layout(parser)


def _add_video(parser: argparse.ArgumentParser) -> None:
    video = parser.add_argument_group("video")
    length = video.add_mutually_exclusive_group(required=True)
    length.add_argument("--frames", type=int, metavar="N", help="sampled frames")
    length.add_argument("--duration", type=float, metavar="SECONDS", help="length of the video")
    width, height = _DEFAULT_SIZE
    video.add_argument(
        "--size",
        type=_size,
        default=_DEFAULT_SIZE,
        metavar="WxH",
        help=f"of the video, in pixels (default: {width}x{height})",
    )
    video.add_argument(
        "--video-fps",
        type=float,
        default=Request.video_fps,
        metavar="FPS",
        help="frame rate of the file, with --duration (default: %(default)g)",
    )
    video.add_argument(
        "--mm-process-config",
        type=_video_settings,
        default={},
        metavar="JSON",
        help="what the server gets under this name, such as "
        """'{"video": {"fps": 1, "max_pixels": 401408}}'; of "video", these take effect: """
        f"{', '.join(registry.setting_names())}",
    )
    for name, kind, text in (
        ("fps", float, "frames sampled from a second of video"),
        ("max_frames", int, "most frames sampled from a video"),
    ):
        video.add_argument(
            _flag(name), type=kind, metavar="N", help=f"short for this setting: {text}"
        )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("layout")
    for option in dataclasses.fields(PevlmConfig):
        if option.name in ("sink_frames", "block_frames"):
            layout.add_argument(
                _flag(option.name),
                type=int,
                metavar="N",
                help=f"{option.metadata['help']} (default: {option.default})",
            )
    layout.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="tokens of the system prompt and of text before the video (default: the chat "
        "template's own system prompt)",
    )
    layout.add_argument(
        "--question-tokens",
        type=int,
        default=Request.question_tokens,
        metavar="N",
        help=f"tokens of the text after the video (default: {Request.question_tokens})",
    )


def _show(arguments: argparse.Namespace) -> int:
    model, preset = _model_and_preset(arguments)
    layout_flags = _given(arguments, ("sink_frames", "block_frames"))
    prompt = Prompt.build(model, resolve(preset, layout_flags), _request(arguments))
    if arguments.png is not None:
        from pevlm_sglang.tools.picture import draw_png

        draw_png(prompt, arguments.png)
    print(as_json(prompt) if arguments.json else as_text(prompt))
    return 0


def _model_and_preset(arguments: argparse.Namespace) -> tuple[Model, str | None]:
    source, preset, family = arguments.source, arguments.config, arguments.model_family
    if source is not None and (source in preset_names() or source.endswith(_PRESET_SUFFIXES)):
        if preset is not None:
            raise ValueError(f"--config {preset}: expected one preset, got {source} too")
        source, preset = None, source
    if source is None:
        return Model.published(family or _DEFAULT_FAMILY), preset
    if family is not None:
        raise ValueError(f"--model-family: {source}/config.json names the family; leave it out")
    if not Path(source).is_dir():
        raise ValueError(
            f"{source}: expected the directory of a checkpoint or a preset "
            f"({', '.join(preset_names())}, or a YAML file); for a published checkpoint, leave it "
            "out"
        )
    return Model.read(Path(source)), preset


def _request(arguments: argparse.Namespace) -> Request:
    settings = {**arguments.mm_process_config, **_given(arguments, ("fps", "max_frames"))}
    return Request(
        size=arguments.size,
        settings=settings,
        sampled=arguments.frames,
        duration=arguments.duration,
        video_fps=arguments.video_fps,
        prompt_tokens=arguments.prompt_tokens,
        question_tokens=arguments.question_tokens,
    )


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
