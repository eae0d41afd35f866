"""What a request says about the sampling of its videos: ``fps``, ``max_frames``, ``max_pixels``,
``frames``.

A chat request says it in the ``video_url`` part, beside ``url``; on ``/generate`` an entry of
``video_data`` may be a mapping with ``url`` and these names. It applies to that video alone, within
the server's limits.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

KEYFRAMES = "keyframes"


@dataclass(frozen=True)
class Wishes:
    """The wishes of one video; None = the server's setting.

    Attributes:
        fps: frames sampled from a second of video.
        max_frames: most frames sampled.
        max_pixels: most pixels of a sampled frame after the resize.
        frames: ``keyframes`` = those near the sampled frames in their place, see
            :mod:`pevlm_sglang.media.keyframes`. Of every model.

    Raises:
        ValueError: a value of the wrong type, not positive, or another word.
    """

    fps: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None
    frames: str | None = None

    def __post_init__(self) -> None:
        if self.frames not in (None, KEYFRAMES):
            raise ValueError(f"frames: expected {KEYFRAMES!r}, got {reprlib.repr(self.frames)}")
        for name, value in self.numbers().items():
            whole = name != "fps"
            kind: Any = int if whole else (int, float)
            ok = isinstance(value, kind) and not isinstance(value, bool)
            if not ok or not 0 < value < math.inf:
                expected = "a whole number" if whole else "a number"
                raise ValueError(
                    f"{name}: expected {expected} of more than 0, got {reprlib.repr(value)}"
                )

    def numbers(self) -> dict[str, Any]:
        """The wishes that were expressed, but for ``frames``."""
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None and name != "frames"
        }

    def check(self, limits: Mapping[str, float]) -> None:
        """Refuse what this model or this server does not offer.

        Args:
            limits: name → largest value, of all names that the model's processor heeds.

        Raises:
            ValueError: names the wish, what was expected and what came.
        """
        for name, value in self.numbers().items():
            if name not in limits:
                raise ValueError(
                    f"{name}: expected one of {', '.join(limits)} for this model, got {name}"
                )
            if value > limits[name]:
                raise ValueError(
                    f"{name}: expected at most {limits[name]:g}, the server's limit, "
                    f"got {reprlib.repr(value)}; --mm-process-config raises it"
                )


_PROCESSED = (
    "one that is processed already (processor_output, precomputed_embedding), whose sampling and "
    "positions this server cannot answer for; send the video, or serve without PEVLM"
)
_NAMES = tuple(field.name for field in fields(Wishes))


def split(
    video_data: Sequence[Any] | None, read_elsewhere: Sequence[str] = ()
) -> tuple[list[Any], list[Wishes]]:
    """The videos of a request as SGLang loads them, and what each says about its sampling.

    Args:
        video_data: of SGLang's ``GenerateReqInput``: paths, URLs or bytes, ``VideoData`` objects
            (from ``video_url``), or mappings (from ``/generate``).
        read_elsewhere: names in a ``video_url`` part that are no sampling, and that SGLang hands to
            the processor in another way.

    Raises:
        ValueError: a bad value, or a name that nobody reads.
    """
    pairs = [_split(video, read_elsewhere) for video in video_data or ()]
    return [source for source, _ in pairs], [sampling for _, sampling in pairs]


def _split(video: Any, read_elsewhere: Sequence[str]) -> tuple[Any, Wishes]:
    source: Any
    wishes: Mapping[str, Any] | None
    if isinstance(video, Mapping):
        if "url" not in video:
            raise ValueError(
                "video: expected a file, URL, bytes or frames, or a mapping with url, got "
                f"{_PROCESSED if 'format' in video else 'another one'}"
            )
        source, wishes = video["url"], {k: v for k, v in video.items() if k != "url"}
    elif (wishes := getattr(video, "preprocess_kwargs", None)) is not None:
        source, wishes = video.url, {k: v for k, v in wishes.items() if k not in read_elsewhere}
    else:
        return video, Wishes()
    if unknown := [name for name in wishes if name not in _NAMES]:
        raise ValueError(f"video {str(unknown[0])[:50]}: expected one of {', '.join(_NAMES)}")
    return source, Wishes(**wishes)
