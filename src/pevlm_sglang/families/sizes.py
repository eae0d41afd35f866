"""What a video becomes: sampled frames and tokens, from its length and size alone. ``pevlm show``
stands on it; nothing here imports SGLang or torch."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self


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


@dataclass(frozen=True)
class Settings:
    """Video settings of a server: keys of SGLang's ``--mm-process-config '{"video": {...}}'``.

    Raises:
        ValueError: a value of the wrong type, or not positive.
    """

    whole: ClassVar[tuple[str, ...]] = ()  # names whose values are whole numbers

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            whole = field.name in self.whole
            ok = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not ok or not 0 < value < math.inf:
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{field.name}: expected {kind} of more than 0, got {value!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any], names: Sequence[str], **defaults: Any) -> Self:
        """The settings in the ``video`` section of the server's flag.

        Args:
            values: of the section.
            names: those that the family heeds.
            defaults: where a checkpoint has its own.

        Raises:
            ValueError: an unknown name, or a bad value.
        """
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"video setting {unknown[0]}: expected one of {', '.join(names)}")
        return cls(**{**defaults, **values})

    def given(self) -> dict[str, float]:
        """The settings that are not at their default, as the server's flag takes them."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


@dataclass(frozen=True)
class Geometry(ABC):
    """How a checkpoint samples, resizes and spells a video on a server with PEVLM.

    Attributes:
        model_type: of ``config.json``.
        patch_size: pixels a side of a patch of the vision tower.
        merge_size: patches a side that become one token.
        frames_per_step: sampled frames that the vision tower merges into one step.
        context_length: tokens, of ``config.json``; None where it does not say.
        setting_names: in the ``video`` section of ``--mm-process-config``, those that it heeds.
    """

    model_type: str = ""
    patch_size: int = 14
    merge_size: int = 2
    frames_per_step: int = 1
    context_length: int | None = None

    setting_names: ClassVar[tuple[str, ...]]

    @property
    def default_prompt_tokens(self) -> int:
        """Of the system prompt that the chat template adds by itself."""
        return 6  # "You are a helpful assistant."

    @abstractmethod
    def settings(self, values: Mapping[str, Any]) -> Any:
        """The :class:`Settings` in the ``video`` section of the server's flag.

        Raises:
            ValueError: an unknown name, a bad value, or values that contradict each other.
        """

    @abstractmethod
    def limits(self, settings: Any) -> dict[str, float]:
        """What a request may say beside its video, and its largest value."""

    @abstractmethod
    def sample(self, sampled: int, settings: Any) -> tuple[int, float]:
        """Length in frames and frame rate of a file of which ``sampled`` frames are sampled: one
        of as many.

        Raises:
            ValueError: another number is sampled.
        """

    @abstractmethod
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
        return 8, 5


class SizeRules(Protocol):
    """What a family's module ``sizes`` offers.

    Attributes:
        PUBLISHED: the published checkpoints, by a name for the command line.
    """

    @property
    def PUBLISHED(self) -> Mapping[str, Geometry]: ...  # noqa: N802

    def of_checkpoint(self, config: Mapping[str, Any], directory: Path) -> Geometry:
        """The geometry of a checkpoint.

        Args:
            config: of ``config.json`` in the directory.

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
        return dict(section(content, "video_processor"))
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (directory / name).exists():
            return read_json(directory / name)
    raise ValueError(
        f"{directory}: expected processor_config.json, video_preprocessor_config.json or "
        "preprocessor_config.json, found none"
    )


def whole(values: Mapping[str, Any], name: str, default: Any = None) -> int:
    """A number of at least 1 in a checkpoint's JSON file.

    Raises:
        ValueError: it is missing, or something else.
    """
    value = default if values.get(name) is None else values[name]
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{name}: expected a whole number of at least 1 in the checkpoint's JSON files, got "
            f"{value!r}"
        )
    return value


def section(values: Mapping[str, Any], name: str, default: Any = None) -> Mapping[str, Any]:
    """An object inside a checkpoint's JSON file.

    Raises:
        ValueError: it is missing, or something else.
    """
    value = default if values.get(name) is None else values[name]
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name}: expected an object in the checkpoint's JSON files, got {str(value)[:50]}"
        )
    return value


def context_length(text: Mapping[str, Any]) -> int | None:
    """Of a language model's configuration; None where it does not say."""
    if text.get("max_position_embeddings") is None:
        return None
    return whole(text, "max_position_embeddings")


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
