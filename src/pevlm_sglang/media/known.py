"""Files that were read before, by what the file system says of them: a plan needs no more of one
than its length, rate and size, and a look-up no more than its digest."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.media import limits
from pevlm_sglang.media.identity import file_stamp, stamp_of

_MOST = 4096
_RECENT_NS = 100_000_000  # a file system may give two writes of a file the same time


@dataclass(frozen=True)
class Facts:
    """Of a file.

    Attributes:
        stamp: see :func:`~pevlm_sglang.media.identity.file_stamp`.
        digest: SHA-256 of the file.
        frames, rate, shape: frames, frames a second, height and width of one.
        keys: numbers of its keyframes; None where the decoder does not tell.
    """

    stamp: tuple[int, ...]
    digest: bytes
    frames: int
    rate: float
    shape: tuple[int, int]
    keys: tuple[int, ...] | None


class KnownVideo(VideoDecoderWrapper):
    """A file that is not open, behind the interface of an open one."""

    avg_fps = 0.0  # in place of properties
    frame_shape = 0, 0

    def __init__(self, source: Any, facts: Facts) -> None:
        self.source, self.facts = source, facts
        self.avg_fps, self.frame_shape = facts.rate, facts.shape
        self.keyframes = None if facts.keys is None else list(facts.keys)

    def __len__(self) -> int:
        return self.facts.frames

    def __del__(self) -> None: ...


class KnownVideos:
    """Of a server."""

    def __init__(self) -> None:
        self._facts: OrderedDict[Hashable, Facts] = OrderedDict()

    def find(self, tenant: Hashable, source: Any) -> Any:
        """The source, or what is known of it; see :class:`KnownVideo`.

        Raises:
            ValueError: a path that requests may not name, though what it leads to is known.
        """
        stamp = file_stamp(source)
        facts = self._facts.get((tenant, stamp))
        if stamp is None or facts is None:
            return source
        limits.limits.check_source(getattr(source, "url", source))
        return KnownVideo(source, facts)

    def remember(
        self, tenant: Hashable, video: Any, digest: bytes, keys: Sequence[int] | None
    ) -> None:
        """What an open file says, unless it is so young that its time may not tell it from the next
        one of its name."""
        stamp = stamp_of(video)
        if stamp is None or time.time_ns() - max(stamp[-2:]) < _RECENT_NS:
            return
        self._facts[tenant, stamp] = Facts(
            stamp,
            digest,
            len(video),
            float(video.avg_fps),
            tuple(video.frame_shape),
            None if keys is None else tuple(keys),
        )
        while len(self._facts) > _MOST:
            self._facts.popitem(last=False)

    def clear(self) -> None:
        self._facts.clear()
