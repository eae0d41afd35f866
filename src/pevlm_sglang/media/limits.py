"""What a request may have the server open, and how large it may be.

SGLang bounds a download's size, time and redirects, and takes a list of hosts
(``--allowed-media-domains``); it opens any path, and any address that it can reach. Here, a server
that listens beyond its own machine opens paths below ``--pevlm-media-paths`` alone, and private
addresses of listed hosts alone.
Source: sglang/srt/utils/common.py (``download_remote_media``), sglang/srt/multimodal/processors.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlparse

from pevlm_sglang.seams import wrap
from pevlm_sglang.settings.config import PevlmConfig

_SCHEMES = ("data:", "http://", "https://")


@dataclass(frozen=True)
class Limits:
    """Of a server.

    Attributes:
        paths: directories below which files may be opened; None = everywhere.
        private_hosts: whether private addresses may be fetched from.
        source_bytes: of a file or of what a request holds itself.
        video_seconds: of a video.
        frame_pixels: of a video's frame, before it is resized.
    """

    paths: tuple[str, ...] | None = None
    private_hosts: bool = True
    source_bytes: int = PevlmConfig.max_source_mb << 20
    video_seconds: int = PevlmConfig.max_video_seconds
    frame_pixels: int = PevlmConfig.max_frame_megapixels << 20

    @classmethod
    def of(cls, config: PevlmConfig, host: str | None) -> Limits:
        """Args:
        host: that the server listens on; None = it does not listen.
        """
        own_machine = host is None or _is_loopback(host)
        paths = tuple(filter(None, config.media_paths.split(os.pathsep)))
        return cls(
            None if own_machine and not paths else tuple(map(os.path.realpath, paths)),
            own_machine,
            config.max_source_mb << 20,
            config.max_video_seconds,
            config.max_frame_megapixels << 20,
        )

    def check_source(self, source: Any) -> None:
        """Refuse a file outside the directories, and one or a request's own bytes too large.

        Args:
            source: an image or a video, as SGLang takes it.

        Raises:
            ValueError: says what is allowed, and which flag does.
        """
        source = getattr(source, "url", source)
        size = 0
        if isinstance(source, bytes):
            size = len(source)
        elif isinstance(source, str) and source.startswith("data:"):
            size = len(source) * 3 // 4
        elif isinstance(source, str) and not source.startswith(_SCHEMES):
            path = unquote(urlparse(source).path) if source.startswith("file://") else source
            if not _may_be_a_path(path, source):
                size = len(source) * 3 // 4  # base64
            else:
                self._check_path(path)
                size = os.path.getsize(path) if os.path.isfile(path) else 0
        if size > self.source_bytes:
            raise ValueError(
                f"media source: expected at most {self.source_bytes} bytes "
                f"(--pevlm-max-source-mb), got {size}"
            )

    def _check_path(self, path: str) -> None:
        if self.paths is None:
            return
        real = os.path.realpath(path)
        if not any(os.path.commonpath([real, directory]) == directory for directory in self.paths):
            allowed = f"a file below {', '.join(self.paths)}" if self.paths else "no path"
            raise ValueError(
                f"media source: expected {allowed}, got {path[:100]}; this server listens beyond "
                "its own machine or has --pevlm-media-paths, which names what may be opened"
            )

    def check_video(self, frames: int, fps: float, size: tuple[int, int]) -> None:
        """Refuse a video that is too long, or has too large frames.

        Args:
            frames, fps: of the file.
            size: width and height.

        Raises:
            ValueError: names the limit's flag.
        """
        if frames / fps > self.video_seconds:
            raise ValueError(
                f"video: expected at most {self.video_seconds} seconds "
                f"(--pevlm-max-video-seconds), got {frames / fps:.0f}"
            )
        width, height = size
        if width * height > self.frame_pixels:
            raise ValueError(
                f"video: expected frames of at most {self.frame_pixels} pixels "
                f"(--pevlm-max-frame-megapixels), got {width} x {height}"
            )


limits = Limits()
"""Of this process; see :func:`install`."""


def install(config: PevlmConfig, host: str | None) -> None:
    """Set the limits of this process, a server's launcher.

    Raises:
        UnsupportedError: this SGLang lacks the seam.
    """
    from sglang.srt.utils import common

    global limits
    limits = Limits.of(config, host)
    wrap(common, "_assert_media_url_allowed", _public_alone, parameters=("url",))


def _public_alone(assert_allowed: Callable[[str], None]) -> Callable[[str], None]:
    """SGLang asks for the URL and for each redirect, before it connects."""

    def corrected(url: str) -> None:
        from sglang.srt.utils import common

        assert_allowed(url)
        if limits.private_hosts or common._allowed_media_domains:  # the host is one of them
            return
        host = urlparse(url).hostname or ""
        try:
            found = socket.getaddrinfo(host, None)
        except OSError:
            return  # the download says so
        for *_, address in found:
            if not ipaddress.ip_address(str(address[0]).split("%")[0]).is_global:
                raise ValueError(
                    f"media source: expected a host with public addresses, got {host}; "
                    "--allowed-media-domains names the others from which may be fetched"
                )

    return corrected


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _may_be_a_path(path: str, source: str) -> bool:
    """Whether SGLang opens it as a file: whatever starts like a path, and what is one."""
    return source.startswith(("/", "file://")) or os.path.isfile(path)
