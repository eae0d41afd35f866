"""Families that sample a number of frames from a video, whatever its length, each of one size: a
server's settings of them, and the tokens of a frame with the text around it."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pevlm_sglang.families.sizes import Geometry, Settings, VideoTokens


@dataclass(frozen=True)
class FrameSettings(Settings):
    """See the base.

    Attributes:
        num_frames: frames sampled from a video of a request that does not say; frames repeat where
            the video has fewer, as in the references.
        fps: frames sampled from a second of video, in place of that; where they are more than
            ``num_frames``, as many are sampled evenly. Not in every family.
        max_frames: most frames that a request may ask for.

    Raises:
        ValueError: see the base, and more frames than the most.
    """

    whole = ("num_frames", "max_frames")

    num_frames: int
    fps: float | None = None
    max_frames: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames > self.max_frames:
            raise ValueError(
                f"num_frames: expected at most max_frames ({self.max_frames}), "
                f"got {self.num_frames}"
            )

    def wished(self, wish: Any) -> FrameSettings:
        """For one video, whose request says ``wish`` (:class:`~pevlm_sglang.media.wishes.Wishes`)
        within the limits."""
        frames = wish.max_frames or self.num_frames
        return dataclasses.replace(self, num_frames=frames, fps=wish.fps or self.fps)


def evenly(total_frames: int, count: int) -> list[float]:
    """Positions from the first frame to the last: ``np.linspace(0, total_frames - 1, count)``, to
    the last bit, without numpy, which ``pevlm show`` does without."""
    last = total_frames - 1
    if count == 1:
        return [0.0]
    return [i * (last / (count - 1)) for i in range(count - 1)] + [float(last)]


@dataclass(frozen=True)
class FrameGeometry(Geometry):
    """See the base. An odd number of patches a side is rounded up to whole tokens.

    Attributes:
        image_size: pixels a side of a frame as the vision tower sees it.
        num_frames: sampled from a video, where neither server nor request says.
    """

    image_size: int = 448
    num_frames: int = 1

    setting_names: ClassVar[tuple[str, ...]] = ("num_frames", "fps", "max_frames")

    def settings(self, values: Mapping[str, Any]) -> FrameSettings:
        return FrameSettings.of(values, self.setting_names, num_frames=self.num_frames)

    def limits(self, settings: FrameSettings) -> dict[str, float]:
        rate = {"fps": math.inf} if "fps" in self.setting_names else {}
        return {**rate, "max_frames": settings.max_frames}

    @abstractmethod
    def indices(self, total_frames: int, fps: float, settings: FrameSettings) -> list[int]:
        """Which frames of a file are sampled, ascending.

        Args:
            total_frames, fps: of the file.
            settings: for this video.
        """

    def text_tokens(self, number: int) -> int:
        """Of the text around frame ``number``, counted from 1: a newline."""
        return 1

    def sample(self, sampled: int, settings: FrameSettings) -> tuple[int, float]:
        fps = settings.fps or 1.0
        if (frames := len(self.indices(sampled, fps, settings))) != sampled:
            raise ValueError(
                f"{sampled} sampled frames: {frames} are sampled from any video here; "
                f"set num_frames to {sampled}"
            )
        return sampled, fps

    def video(
        self, total_frames: int, fps: float, size: tuple[int, int], settings: FrameSettings
    ) -> VideoTokens:
        """See the base. The size of its frames does not matter."""
        if total_frames < 1 or min(size) < 1:
            raise ValueError(f"video: expected a frame, got {total_frames} of {size}")
        frames = len(self.indices(total_frames, fps, settings))
        return VideoTokens(frames, self.steps(frames), (self.image_size, self.image_size))

    @property
    def tokens_per_frame(self) -> int:
        """Without the text around it."""
        return (-(-(self.image_size // self.patch_size) // self.merge_size)) ** 2

    def steps(self, frames: int) -> tuple[int, ...]:
        """Tokens of each frame, with the text around it."""
        numbers = range(1, frames + 1)
        return tuple(self.tokens_per_frame + self.text_tokens(number) for number in numbers)
