"""What a video becomes: sampled frames, tokens, sink, blocks, and what attention then costs; from a
checkpoint's JSON files and the size of a video, without weights, a server or SGLang."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

from pevlm_sglang.families.sizes import Geometry
from pevlm_sglang.layout import FrameSpans, Layout, Range
from pevlm_sglang.settings.config import PevlmConfig, flag


class Model(NamedTuple):
    """What the user calls it, and the geometry of its family."""

    name: str
    geometry: Geometry


@dataclass(frozen=True)
class Request:
    """One video between text, as a user would send it.

    Attributes:
        size: width and height of the video, in pixels.
        settings: video settings of the server, by name.
        sampled, duration: frames that the server samples, or seconds of the video: one of them.
        video_fps: frame rate of the file.
        prompt_tokens: of any text before the video; None is the chat template's system prompt.
        question_tokens: of the text after the video.

    Raises:
        ValueError: a value out of range.
    """

    size: tuple[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    sampled: int | None = None
    duration: float | None = None
    video_fps: float = 30.0
    prompt_tokens: int | None = None
    question_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "question_tokens"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)}")
        for name in ("sampled", "duration", "video_fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        if (self.sampled is None) == (self.duration is None):
            raise ValueError("expected either a number of sampled frames or a duration")


class Prompt:
    """The prompt that SGLang makes of a request.

    Attributes:
        settings: the request's video settings, in the form of the model's geometry.
        prompt_tokens: of the system prompt, and of any text before the video.
        chat_template_tokens: before and after the video, beside those and the question's.
        video, spans, layout: what the video becomes.
        length: tokens in the prompt.
        step_tokens: least and most of a step.
        frame_tokens: of a sampled frame, on average.

    Raises:
        ValueError: a bad setting, SGLang would not sample the number that is asked for, or would
            refuse the video.
    """

    def __init__(self, model: Model, config: PevlmConfig, request: Request) -> None:
        self.model, self.config, self.request = model, config, request
        geometry = model.geometry
        self.settings = geometry.settings(request.settings)
        if request.duration is None:
            assert request.sampled is not None
            total, fps = geometry.sample(request.sampled, self.settings)
        else:
            total, fps = round(request.duration * request.video_fps), request.video_fps
        self.video = geometry.video(total, fps, request.size, self.settings)
        given = request.prompt_tokens
        self.prompt_tokens = geometry.default_prompt_tokens if given is None else given
        before, after = geometry.chat_template_tokens(self.prompt_tokens)
        self.chat_template_tokens = before, after
        steps, each = self.video.steps, geometry.frames_per_step
        ends = [*accumulate(steps, initial=before + self.prompt_tokens)]
        self.spans = FrameSpans(tuple(pairwise(ends)), each)
        self.layout = Layout.build(
            [self.spans] if config.enabled else [],
            sink_frames=config.sink_frames,
            block_frames=config.block_frames,
        )
        self.length = self.spans.end + after + request.question_tokens
        self.step_tokens = min(steps), max(steps)
        self.frame_tokens = sum(steps) / len(steps) / each
        self.visible_fraction = self.layout.visible_fraction(self.length)

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
            flags += [flag(f"pevlm_{name}"), str(getattr(self.config, name))]
        if not self.config.enabled:
            flags += ["--pevlm-enabled", "false"]
        if video := self.settings.given():
            flags += ["--mm-process-config", json.dumps({"video": video})]
        return shlex.join(flags)


def as_json(prompt: Prompt) -> str:
    """The prompt as one JSON object; token ranges are half-open."""
    request, geometry, video = prompt.request, prompt.model.geometry, prompt.video
    content = {
        "model": prompt.model.name,
        "model_type": geometry.model_type,
        "config": prompt.config.describe(),
        "geometry": asdict(cast(Any, geometry)),
        "video_settings": asdict(prompt.settings),
        "assumed": {
            "size": request.size,
            "duration": request.duration,
            "video_fps": request.video_fps if request.duration is not None else None,
            "system_prompt_tokens": prompt.prompt_tokens,
            "question_tokens": request.question_tokens,
            "chat_template_tokens": prompt.chat_template_tokens,
        },
        "frames": video.frames,
        "resized": video.resized,
        "video_grid_thw": video.grid,
        "steps": len(video.steps),
        "frames_per_step": prompt.spans.frames_per_step,
        "tokens_per_step": prompt.step_tokens,
        "tokens_per_frame": prompt.frame_tokens,
        "prompt_tokens": prompt.length,
        "context_length": geometry.context_length,
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
    video, spans, request = prompt.video, prompt.spans, prompt.request
    each, (before, after) = spans.frames_per_step, prompt.chat_template_tokens
    file = f"; a file of {request.video_fps:g} frames a second" if request.duration else ""
    lines = [
        f"model    {prompt.model.name}",
        "video    {} sampled frames of {}x{}, resized to {}x{}".format(
            video.frames, *request.size, *video.resized
        ),
        f"         {len(spans.steps)} steps of {each} frame{'s' if each > 1 else ''}, "
        f"{' to '.join(map(str, sorted({*prompt.step_tokens})))} tokens a step, "
        f"{prompt.frame_tokens:.4g} a frame",
        f"prompt   {prompt.length} tokens: {spans.start} before the video, "
        f"{spans.end - spans.start} in it, {prompt.length - spans.end} after it",
        f"assumed  system prompt {prompt.prompt_tokens} tokens, question "
        f"{request.question_tokens}; chat template {before} tokens before and {after} after the "
        f"video{file}",
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
    first, last = 3, 2  # of many blocks, these are printed
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
    limit = prompt.model.geometry.context_length
    if limit is not None and prompt.length > limit:
        yield (
            f"the prompt is longer than the model's context of {limit} tokens; sample fewer frames "
            "or pixels, or raise SGLang's --context-length"
        )
