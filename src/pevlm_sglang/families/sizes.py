"""What a video becomes: sampled frames and tokens, from its length and size alone. ``pevlm show``
stands on it; nothing here imports SGLang or torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class VideoTokens:
    """What one video becomes.

    Attributes:
        frames: sampled frames.
        steps: tokens of each step, in-item text included.
        resized: width and height of a frame as the vision tower sees it, in pixels.
        grid: steps, patches in a column, patches in a row, in families that have a
            ``video_grid_thw``.
    """

    frames: int
    steps: tuple[int, ...]
    resized: tuple[int, int]
    grid: tuple[int, int, int] | None = None


class Geometry(Protocol):
    """How a checkpoint samples, resizes and spells a video on a server with PEVLM.

    Attributes:
        model_type: of ``config.json``.
        frames_per_step: sampled frames that the vision tower merges into one step.
        context_length: tokens, of ``config.json``; None where it does not say.
        default_prompt_tokens: of the system prompt that the chat template adds by itself.
    """

    @property
    def model_type(self) -> str: ...

    @property
    def frames_per_step(self) -> int: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def default_prompt_tokens(self) -> int: ...

    def settings(self, values: Mapping[str, Any]) -> Any:
        """The settings in the ``video`` section of SGLang's ``--mm-process-config``: a frozen
        dataclass with ``given()``, the values that are not at their default.

        Raises:
            ValueError: an unknown name, a bad value, or values that contradict each other.
        """

    def sample(self, sampled: int, settings: Any) -> tuple[int, float]:
        """Length in frames and frame rate of a file of which ``sampled`` frames are sampled.

        Raises:
            ValueError: no file gives that number.
        """

    def video(
        self, total_frames: int, fps: float, size: tuple[int, int], settings: Any
    ) -> VideoTokens:
        """What a file becomes.

        Args:
            total_frames, fps, size: of the file; width and height in pixels.
            settings: see :meth:`settings`.

        Raises:
            ValueError: the server refuses the video.
        """

    def chat_template_tokens(self, prompt_tokens: int) -> tuple[int, int]:
        """Tokens of the chat template before and after one video that is followed by the question.

        Args:
            prompt_tokens: of the system prompt; 0 where there is none.
        """


class SizeRules(Protocol):
    """What a family's module ``sizes`` offers.

    Attributes:
        SETTINGS: names in the ``video`` section of ``--mm-process-config`` that it heeds.
        WISHES: names that a request may say beside its video.
        PUBLISHED: the published checkpoints, by a name for the command line.
    """

    SETTINGS: tuple[str, ...]
    WISHES: tuple[str, ...]

    @property
    def PUBLISHED(self) -> Mapping[str, Geometry]: ...  # noqa: N802

    def of_checkpoint(self, config: Mapping[str, Any], directory: Path) -> Geometry:
        """The geometry of a checkpoint.

        Args:
            config: of ``config.json``.
            directory: of the checkpoint.

        Raises:
            ValueError: a missing file, or settings that are not known here.
        """


def processor_settings(directory: Path) -> dict[str, Any]:
    """The video processor's settings, from the first file that transformers would take.

    Raises:
        ValueError: no file, or a broken one.

    Source: ``BaseVideoProcessor.get_video_processor_dict`` of transformers.
    """
    nested = directory / "processor_config.json"
    if nested.exists() and "video_processor" in (content := read_json(nested)):
        return dict(content["video_processor"])
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (directory / name).exists():
            return read_json(directory / name)
    raise ValueError(
        f"{directory}: expected processor_config.json, video_preprocessor_config.json or "
        "preprocessor_config.json, found none"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
