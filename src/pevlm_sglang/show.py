"""What a video becomes: sampled frames, tokens, sink, blocks, and what attention then costs.

Everything is computed from a checkpoint's JSON files and the size of a video: no weights, no
server, no SGLang import.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pevlm_sglang.config import PevlmConfig
from pevlm_sglang.families import qwen_vl
from pevlm_sglang.families.qwen_vl import VideoKnobs, VideoProcessor
from pevlm_sglang.frames import SpanRule
from pevlm_sglang.layout import FrameSpans, Layout, Range

_SHOWN_BLOCKS = (3, 2)  # of many blocks, the first and the last ones are printed


@dataclass(frozen=True)
class Model:
    """What the layout takes from a model.

    Attributes:
        name: what the user called it.
        model_type: of ``config.json``.
        context_length: tokens, of ``config.json``; None where it does not say.
    """

    name: str
    model_type: str
    processor: VideoProcessor
    context_length: int | None = None

    @classmethod
    def published(cls, model_type: str) -> Model:
        """A published checkpoint of a family, from what is known about it."""
        return cls(
            f"published {model_type}",
            model_type,
            qwen_vl.PUBLISHED[model_type],
            qwen_vl.PUBLISHED_CONTEXT[model_type],
        )

    @classmethod
    def read(cls, directory: Path) -> Model:
        """A checkpoint's directory; its weights are not needed.

        Raises:
            ValueError: a file that is missing or broken, or files that contradict each other.
            UnsupportedError: an architecture that PEVLM does not support.
        """
        config = _read_json(directory / "config.json")
        vision = {"temporal_patch_size": 2, **(config.get("vision_config") or {})}
        rule = SpanRule.of_model(
            SimpleNamespace(
                architectures=config.get("architectures"), vision_config=SimpleNamespace(**vision)
            )
        )
        model_type = str(config.get("model_type"))
        processor = qwen_vl.video_processor(model_type, _processor_settings(directory))
        if rule.frames_per_step != processor.temporal_patch_size:
            raise ValueError(
                f"temporal_patch_size: config.json of {directory} says {rule.frames_per_step}, "
                f"its processor files say {processor.temporal_patch_size}"
            )
        text = config.get("text_config") or config
        return cls(str(directory), model_type, processor, text.get("max_position_embeddings"))


def _processor_settings(directory: Path) -> dict[str, Any]:
    """The video processor's settings, from the first file that transformers would take.

    Source: ``BaseVideoProcessor.get_video_processor_dict`` of transformers.
    """
    nested = directory / "processor_config.json"
    if nested.exists() and "video_processor" in (content := _read_json(nested)):
        return dict(content["video_processor"])
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (directory / name).exists():
            return _read_json(directory / name)
    raise ValueError(
        f"{directory}: expected processor_config.json, video_preprocessor_config.json or "
        "preprocessor_config.json, found none"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


@dataclass(frozen=True)
class Request:
    """One video between text, as a user would send it.

    Attributes:
        size: width and height of the video, in pixels.
        knobs: video settings of the server.
        sampled: frames that the server samples; None where ``duration`` says how many.
        duration: of the video, in seconds; None where ``sampled`` is given.
        video_fps: frame rate of the file.
        prompt_tokens: of the system prompt, and of any text before the video.
        question_tokens: of the text after the video.

    Raises:
        ValueError: a value out of range.
    """

    size: tuple[int, int]
    knobs: VideoKnobs
    sampled: int | None = None
    duration: float | None = None
    video_fps: float = 30.0
    prompt_tokens: int = qwen_vl.DEFAULT_SYSTEM_PROMPT_TOKENS
    question_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "question_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)}")
        for name in ("sampled", "duration", "video_fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        if (self.sampled is None) == (self.duration is None):
            raise ValueError("expected either a number of sampled frames or a duration")

    @cached_property
    def frames(self) -> int:
        """Sampled frames.

        Raises:
            ValueError: SGLang would not sample the number that is asked for, or refuses the video.
        """
        if self.duration is not None:
            total = round(self.duration * self.video_fps)
            return qwen_vl.sampled_frames(total, self.video_fps, self.knobs)
        assert self.sampled is not None
        frames = qwen_vl.sampled_frames(self.sampled, self.knobs.fps, self.knobs)
        if frames != self.sampled:
            raise ValueError(
                f"{self.sampled} sampled frames: SGLang would sample {frames} here, an even number "
                f"up to max_frames ({self.knobs.max_frames}), or nframes where that is set"
            )
        return frames

    def assumptions(self) -> Iterator[str]:
        """What a real prompt may have otherwise."""
        before, after = qwen_vl.CHAT_TEMPLATE_TOKENS
        yield f"system prompt {self.prompt_tokens} tokens, question {self.question_tokens}"
        yield f"chat template {before} tokens before and {after} after the video"
        if self.duration is not None:
            yield f"a file of {self.video_fps:g} frames a second"


@dataclass(frozen=True)
class Prompt:
    """The tokens of a request, and their layout.

    Attributes:
        grid: steps, patches in a column, patches in a row.
        length: tokens in the prompt.
    """

    model: Model
    config: PevlmConfig
    request: Request
    grid: tuple[int, int, int]
    spans: FrameSpans
    layout: Layout
    length: int

    @classmethod
    def build(cls, model: Model, config: PevlmConfig, request: Request) -> Prompt:
        """Predict the prompt that SGLang makes of a request.

        Raises:
            ValueError: SGLang would refuse the video.
        """
        grid = qwen_vl.video_grid(request.frames, *request.size, request.knobs, model.processor)
        before, after = qwen_vl.CHAT_TEMPLATE_TOKENS
        start = before + request.prompt_tokens
        step = qwen_vl.tokens_per_step(grid, model.processor)
        spans = FrameSpans(
            tuple((start + i * step, start + (i + 1) * step) for i in range(grid[0])),
            model.processor.temporal_patch_size,
        )
        layout = Layout.build(
            [spans] if config.enabled else [],
            sink_frames=config.sink_frames,
            block_frames=config.block_frames,
        )
        length = spans.end + after + request.question_tokens
        return cls(model, config, request, grid, spans, layout, length)

    @property
    def step_tokens(self) -> int:
        start, end = self.spans.steps[0]
        return end - start

    @property
    def visible_fraction(self) -> float:
        return self.layout.visible_fraction(self.length)

    @property
    def sink(self) -> Range:
        """All tokens before the first block; empty where PEVLM is switched off."""
        if not self.config.enabled:
            return (0, 0)
        return (0, self.layout.blocks[0].extent_start if self.layout.blocks else self.spans.end)

    @property
    def parts(self) -> list[tuple[str, Range]]:
        """Sink, blocks and question by name; they tile the prompt."""
        if not self.config.enabled:
            return [("all", (0, self.length))]
        blocks = [(f"block {b.index}", (b.start, b.end)) for b in self.layout.blocks]
        return [("sink", self.sink), *blocks, ("question", (self.spans.end, self.length))]

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height of a sampled frame as the vision tower sees it, in pixels."""
        _, rows, columns = self.grid
        patch = self.model.processor.patch_size
        return columns * patch, rows * patch

    def frames_in(self, tokens: Range) -> str:
        """First and last sampled frame whose tokens lie in a range, such as ``4-7``."""
        start, end = tokens
        inside = [i for i, (x, y) in enumerate(self.spans.steps) if start <= x and y <= end]
        if not inside:
            return "-"
        each = self.spans.frames_per_step
        return f"{inside[0] * each}-{(inside[-1] + 1) * each - 1}"

    def server_flags(self) -> str:
        """The flags of SGLang that give this prompt and layout."""
        flags = ["--attention-backend", "pevlm"]
        for name in ("sink_frames", "block_frames"):
            flags += [f"--pevlm-{name.replace('_', '-')}", str(getattr(self.config, name))]
        if not self.config.enabled:
            flags += ["--pevlm-enabled", "false"]
        if video := self.request.knobs.given():
            flags += ["--mm-process-config", json.dumps({"video": video})]
        return shlex.join(flags)


def as_json(prompt: Prompt) -> str:
    """The prompt as one JSON object; token ranges are half-open."""
    request = prompt.request
    content = {
        "model": prompt.model.name,
        "model_type": prompt.model.model_type,
        "config": prompt.config.describe(),
        "video_processor": asdict(prompt.model.processor),
        "video_knobs": asdict(request.knobs),
        "assumed": {
            "size": request.size,
            "duration": request.duration,
            "video_fps": request.video_fps if request.duration is not None else None,
            "system_prompt_tokens": request.prompt_tokens,
            "question_tokens": request.question_tokens,
            "chat_template_tokens": qwen_vl.CHAT_TEMPLATE_TOKENS,
        },
        "frames": request.frames,
        "resized": prompt.resized,
        "video_grid_thw": prompt.grid,
        "steps": len(prompt.spans.steps),
        "frames_per_step": prompt.spans.frames_per_step,
        "tokens_per_step": prompt.step_tokens,
        "tokens_per_frame": prompt.step_tokens / prompt.spans.frames_per_step,
        "prompt_tokens": prompt.length,
        "context_length": prompt.model.context_length,
        "video": [prompt.spans.start, prompt.spans.end],
        "sink": prompt.sink,
        "blocks": [[block.start, block.end] for block in prompt.layout.blocks],
        "question": [prompt.spans.end, prompt.length],
        "visible_fraction": prompt.visible_fraction,
        "attention_speedup": 1 / prompt.visible_fraction,
        "server_flags": prompt.server_flags(),
    }
    return json.dumps(content, indent=2)


def as_text(prompt: Prompt) -> str:
    """The prompt for people."""
    request, spans = prompt.request, prompt.spans
    width, height = request.size
    resized_width, resized_height = prompt.resized
    step = prompt.step_tokens
    lines = [
        f"model    {prompt.model.name}",
        f"video    {request.frames} sampled frames of {width}x{height}, resized to "
        f"{resized_width}x{resized_height}",
        f"         {len(spans.steps)} steps of {spans.frames_per_step} frames, "
        f"{step} tokens a step, {step / spans.frames_per_step:g} a frame",
        f"prompt   {prompt.length} tokens: {spans.start} before the video, "
        f"{spans.end - spans.start} in it, {prompt.length - spans.end} after it",
        f"assumed  {'; '.join(request.assumptions())}",
        f"flags    {prompt.server_flags()}",
        "",
        *_table(prompt),
        "",
        f"visible_fraction   {prompt.visible_fraction:.4f} of the pairs of full attention",
        f"attention speed-up {1 / prompt.visible_fraction:.2f}x by arithmetic "
        "(1 / visible_fraction), in prefill",
    ]
    return "\n".join(lines + [f"note: {note}" for note in _notes(prompt)])


def _table(prompt: Prompt) -> Iterator[str]:
    first, last = _SHOWN_BLOCKS
    hidden = len(prompt.layout.blocks) - first - last
    yield f"{'part':<10}{'tokens':<20}{'count':>8}  sampled frames"
    for i, (name, (start, end)) in enumerate(prompt.parts):  # row 0 is the sink
        if hidden < 2 or not first < i <= first + hidden:
            frames = prompt.frames_in((start, end))
            yield f"{name:<10}{f'[{start}, {end})':<20}{end - start:>8}  {frames}"
        elif i == first + 1:
            yield f"... {hidden} more blocks"


def _notes(prompt: Prompt) -> Iterator[str]:
    if not prompt.config.enabled:
        yield "PEVLM is switched off (enabled: false)"
    elif prompt.layout.first_sparse is None:
        yield "full attention: the sink and one block hold all frames"
    each = prompt.spans.frames_per_step
    for name in ("sink_frames", "block_frames"):
        asked = getattr(prompt.config, name)
        if (whole := prompt.spans.to_steps(asked) * each) != asked:
            yield f"{name} {asked} is rounded up to {whole}, whole steps of {each} frames"
    limit = prompt.model.context_length
    if limit is not None and prompt.length > limit:
        yield (
            f"the prompt is longer than the model's context of {limit} tokens; sample fewer frames "
            "or pixels, or raise SGLang's --context-length"
        )
