"""Families that sample a fixed number of frames from a video, whatever its length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pevlm_sglang.support import UnsupportedError

DEFAULT_NUM_FRAMES = {"InternVLChatModel": 32}
"""Architecture → how many, where neither the server nor the request says."""

MAX_FRAMES = 768
"""What a request may ask for at most, where the server does not say."""


@dataclass(frozen=True)
class FrameCount:
    """The keys of SGLang's ``--mm-process-config '{"video": {...}}'`` that such a family heeds.

    Attributes:
        num_frames: frames sampled from a video of a request that does not say.
        max_frames: most frames that a request may ask for.

    Raises:
        ValueError: a value of the wrong type or not positive, or a default above the limit.
    """

    num_frames: int
    max_frames: int = MAX_FRAMES

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a whole number of more than 0, got {value!r}")
        if self.num_frames > self.max_frames:
            raise ValueError(
                f"num_frames: expected at most max_frames ({self.max_frames}), "
                f"got {self.num_frames}"
            )

    @classmethod
    def of(cls, video_config: Mapping[str, Any], *, default: int) -> FrameCount:
        """The server's setting.

        Args:
            video_config: the ``video`` section of the flag.
            default: ``num_frames`` where the section does not have it.

        Raises:
            ValueError: an unknown name (the message lists the valid ones) or a bad value.
        """
        names = tuple(field.name for field in fields(cls))
        if unknown := [name for name in video_config if name not in names]:
            raise ValueError(f"{unknown[0]}: expected one of {', '.join(names)} for this model")
        return cls(**{"num_frames": default, **video_config})


def check_video_config(
    architectures: Iterable[str], mm_process_config: Mapping[str, Any] | None
) -> None:
    """Refuse a bad ``--mm-process-config`` before the server starts.

    Args:
        architectures: of the model; those of other families are passed over.
        mm_process_config: the flag's value.

    Raises:
        UnsupportedError: names the key, what was expected and what came.
    """
    video_config = (mm_process_config or {}).get("video") or {}
    for name in architectures:
        if name in DEFAULT_NUM_FRAMES:
            try:
                FrameCount.of(video_config, default=DEFAULT_NUM_FRAMES[name])
            except ValueError as error:
                raise UnsupportedError(f"--mm-process-config: video {error}") from None


def share(wishes: Sequence[int | None], default: int, most: int) -> list[int]:
    """How many frames each video of a prompt gets.

    Args:
        wishes: of the request, a number a video; None = the default.
        default: of the server. It shrinks, alike for all videos that take it, where the context
            does not hold as much; a wish does not.
        most: frames that the context holds.

    Raises:
        ValueError: the context does not hold the wishes, and a frame of every other video.
    """
    asked = sum(wish for wish in wishes if wish is not None)
    others = sum(wish is None for wish in wishes)
    if asked + others > max(most, len(wishes)):
        raise ValueError(
            f"max_frames: expected at most {most} frames in all, what the context holds beside "
            f"the text, got {asked} for {len(wishes) - others} of {len(wishes)} videos"
        )
    shared = min(default, max(1, (most - asked) // others)) if others else default
    return [shared if wish is None else wish for wish in wishes]
