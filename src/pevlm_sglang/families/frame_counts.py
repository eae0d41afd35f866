"""Families that sample a number of frames from a video, whatever its length, each of one size: a
server's settings of them, and the tokens of a frame with the text around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pevlm_sglang.families.sizes import VideoTokens


@dataclass(frozen=True)
class FrameSettings:
    """The keys of SGLang's ``--mm-process-config '{"video": {...}}'`` that such a family heeds.

    Attributes:
        num_frames: frames sampled from a video of a request that does not say; frames repeat where
            the video has fewer, as in the references.
        fps: frames sampled from a second of video, in place of that; where they are more than
            ``num_frames``, as many are sampled evenly. Not in every family.
        max_frames: most frames that a request may ask for.

    Raises:
        ValueError: a value of the wrong type, or not positive, or more frames than the most.
    """

    num_frames: int
    fps: float | None = None
    max_frames: int = 768

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "fps" and value is None:
                continue
            kind: Any = (int, float) if name == "fps" else int
            ok = isinstance(value, kind) and not isinstance(value, bool)
            if not ok or not 0 < value < math.inf:
                expected = "a number" if name == "fps" else "a whole number"
                raise ValueError(f"{name}: expected {expected} of more than 0, got {value!r}")
        if self.num_frames > self.max_frames:
            raise ValueError(
                f"num_frames: expected at most max_frames ({self.max_frames}), "
                f"got {self.num_frames}"
            )

    @classmethod
    def of(
        cls, values: Mapping[str, Any], *, default: int, names: Sequence[str] | None = None
    ) -> FrameSettings:
        """The settings in the ``video`` section of the server's flag.

        Args:
            values: of the section.
            default: ``num_frames`` where the section does not have it.
            names: those that the family heeds; None = all.

        Raises:
            ValueError: an unknown name, or a bad value.
        """
        names = SETTINGS if names is None else names
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"video setting {unknown[0]}: expected one of {', '.join(names)}")
        return cls(**{"num_frames": default, **values})

    def given(self) -> dict[str, float]:
        """The settings as the server's flag takes them, without those at their default."""
        return {
            setting.name: value
            for setting in dataclasses.fields(self)
            if (value := getattr(self, setting.name)) != setting.default
        }

    def limits(self) -> dict[str, float]:
        """What a request may ask for at most, in families that know ``fps``."""
        return {"fps": math.inf, "max_frames": self.max_frames}


SETTINGS: tuple[str, ...] = tuple(setting.name for setting in dataclasses.fields(FrameSettings))
WISHES: tuple[str, ...] = ("fps", "max_frames")
"""Of a request, in families that know ``fps``; see :class:`pevlm_sglang.media.wishes.Wishes`."""


@dataclass(frozen=True)
class FrameGeometry:
    """See :class:`~pevlm_sglang.families.sizes.Geometry`.

    Attributes:
        image_size: pixels a side of a frame as the vision tower sees it.
        patch_size: pixels a side of a patch.
        merge_size: patches a side that become one token; an odd number of patches is rounded up.
        num_frames: sampled from a video, where neither server nor request says.
        context_length: tokens, where the checkpoint says.
        template_tokens: of the chat template, before and after a video.
        default_prompt_tokens: of the system prompt that the chat template adds by itself.
    """

    image_size: int = 448
    patch_size: int = 14
    merge_size: int = 2
    num_frames: int = 1
    context_length: int | None = None
    model_type: str = ""
    template_tokens: tuple[int, int] = (8, 5)
    default_prompt_tokens: int = 6  # "You are a helpful assistant."
    frames_per_step: int = 1

    def settings(self, values: Mapping[str, Any]) -> FrameSettings:
        """See :meth:`FrameSettings.of`."""
        return FrameSettings.of(values, default=self.num_frames)

    def sampled(self, total_frames: int, fps: float, settings: FrameSettings) -> int:
        """How many frames of a file are sampled."""
        return settings.num_frames

    def text_tokens(self, number: int) -> int:
        """Of the text around frame ``number``, counted from 1: a newline."""
        return 1

    def sample(self, sampled: int, settings: FrameSettings) -> tuple[int, float]:
        """A file of as many frames as are sampled."""
        fps = settings.fps or 1.0
        frames = self.sampled(sampled, fps, settings)
        if frames != sampled:
            raise ValueError(
                f"{sampled} sampled frames: {frames} are sampled from any video here; "
                f"set num_frames to {sampled}"
            )
        return sampled, fps

    def video(
        self, total_frames: int, fps: float, size: tuple[int, int], settings: FrameSettings
    ) -> VideoTokens:
        """What a file becomes; see the protocol. The size of its frames does not matter."""
        if total_frames < 1 or min(size) < 1:
            raise ValueError(f"video: expected a frame, got {total_frames} of {size}")
        frames = self.sampled(total_frames, fps, settings)
        return VideoTokens(frames, self.steps(frames), (self.image_size, self.image_size))

    def steps(self, frames: int) -> tuple[int, ...]:
        """Tokens of each frame, with the text around it."""
        side = -(-(self.image_size // self.patch_size) // self.merge_size)
        return tuple(side**2 + self.text_tokens(number) for number in range(1, frames + 1))

    def chat_template_tokens(self, prompt_tokens: int) -> tuple[int, int]:
        """See the protocol."""
        return self.template_tokens
