"""By what SGLang's caches know a clip, and by what the media cache knows a file."""

from __future__ import annotations

import hashlib
import os
from typing import Any
from urllib.parse import unquote, urlparse

from pevlm_sglang.media.download import Downloaded
from pevlm_sglang.media.frame_arrays import FrameArrays
from pevlm_sglang.media.stages import stage

CHANGED = "video: expected a file that stays as it is, but it changed while read"

_STAMP = "_pevlm_stamp"


def file_stamp(source: Any) -> tuple[int, ...] | None:
    """What changes when another file takes the place of this one, or its content changes; None for
    what is no path."""
    source = getattr(source, "url", source)
    if not isinstance(source, str) or source.startswith(("data:", "http://", "https://")):
        return None
    path = unquote(urlparse(source).path) if source.startswith("file://") else source
    if not os.path.isfile(path):
        return None
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def remember_stamp(video: Any, stamp: tuple[int, ...] | None) -> None:
    """Leave with an opened video the :func:`file_stamp` of before it was opened."""
    setattr(video, _STAMP, stamp)


def stamp_of(video: Any) -> tuple[int, ...] | None:
    """What :func:`remember_stamp` left."""
    stamp: tuple[int, ...] | None = getattr(video, _STAMP, None)
    return stamp


def check_unchanged(video: Any) -> None:
    """Called when all has been read: frames of one file must not go by the name of another.

    Raises:
        ValueError: the file is another by now.
    """
    before = stamp_of(video)
    if before is None:
        return
    now = file_stamp(video._source)
    if now is None or now[:-1] != before[:-1]:  # a new link to it changes the last, and no frame
        raise ValueError(CHANGED)


def source_digest(video: Any) -> bytes | None:
    """SHA-256 of the file of SGLang's ``VideoDecoderWrapper``, or of frames in its place; None
    for what SGLang did not open."""
    if isinstance(video, FrameArrays):
        with stage("hash"):
            return video.digest
    source = getattr(video, "_source", None)
    if isinstance(source, Downloaded):  # made on the way
        return source.digest
    with stage("hash"):
        if isinstance(source, bytes):
            return hashlib.sha256(source).digest()
        if isinstance(source, str):
            with open(source, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
    return None


def identity(*parts: Any) -> int:
    """63 bits of a digest of these, by their ``repr``; SGLang's hashes of items have 64."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
