"""Families that sample a number of frames from a video, whatever its length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FrameKnobs:
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
    ) -> FrameKnobs:
        """The knobs in the ``video`` section of the server's flag.

        Args:
            values: of the section.
            default: ``num_frames`` where the section does not have it.
            names: those that the family heeds; None = all.

        Raises:
            ValueError: a name that is not one of a knob, or a bad value.
        """
        names = KNOBS if names is None else names
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"video knob {unknown[0]}: expected one of {', '.join(names)}")
        return cls(**{"num_frames": default, **values})

    def given(self) -> dict[str, float]:
        """The knobs as the server's flag takes them, without those at their default."""
        return {
            knob.name: value
            for knob in dataclasses.fields(self)
            if (value := getattr(self, knob.name)) != knob.default
        }

    def limits(self) -> dict[str, float]:
        """What a request may ask for at most, in families that know ``fps``."""
        return {"fps": math.inf, "max_frames": self.max_frames}


KNOBS = tuple(knob.name for knob in dataclasses.fields(FrameKnobs))
