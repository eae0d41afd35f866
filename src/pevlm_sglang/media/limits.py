"""What a request may have the server open, and how large it may be.

SGLang takes a list of hosts (``--allowed-media-domains``); it opens any path, and any address that
it can reach. Here, a server that listens beyond its own machine opens paths below
``--pevlm-media-paths`` alone, and private addresses of listed hosts alone.
Source: sglang/srt/utils/common.py (``download_remote_media``), sglang/srt/multimodal/processors.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterable
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
        source_bytes: of a file, of a download or of what a request holds itself.
        fetch_seconds: of a download, redirects included.
        redirects: of a download.
        video_seconds: of a video.
        frame_pixels: of a video's frame, before it is resized.
        request_pixels: of all media of a request, before they are resized.
    """

    paths: tuple[str, ...] | None = None
    private_hosts: bool = True
    source_bytes: int = PevlmConfig.max_source_mb << 20
    fetch_seconds: int = PevlmConfig.max_fetch_seconds
    redirects: int = PevlmConfig.max_redirects
    video_seconds: int = PevlmConfig.max_video_seconds
    frame_pixels: int = PevlmConfig.max_frame_megapixels << 20
    request_pixels: int = PevlmConfig.max_request_megapixels << 20

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
            config.max_fetch_seconds,
            config.max_redirects,
            config.max_video_seconds,
            config.max_frame_megapixels << 20,
            config.max_request_megapixels << 20,
        )

    @property
    def seconds_to_fetch(self) -> float:
        """Of a download; SGLang's own variable bounds it too, where it is set."""
        return min(self.fetch_seconds, float(os.environ.get("REQUEST_TIMEOUT", "inf")))

    def check_source(self, source: Any) -> None:
        """Refuse a file outside the directories, and one or a request's own bytes too large.

        Args:
            source: an image or a video, as SGLang takes it.

        Raises:
            ValueError: says what is allowed, and which flag does.
        """
        source = getattr(source, "url", source)
        if isinstance(source, str) and (path := path_of(source)) is not None:
            self._check_path(path)
        if (size := size_of(source)) > self.source_bytes:
            raise ValueError(
                f"media source: expected at most {self.source_bytes} bytes "
                f"(--pevlm-max-source-mb), got {size}"
            )

    def check_download(self, size: int) -> None:
        """Refuse a download as soon as it is too large; SGLang's own limit holds too.

        Args:
            size: bytes, of what has come or is said to come.

        Raises:
            ValueError: names the limit's flag.
        """
        from sglang.srt.utils import common

        most, name = self.source_bytes, "--pevlm-max-source-mb"
        if 0 < common._media_url_max_file_size_bytes < most:
            most, name = common._media_url_max_file_size_bytes, "--media-url-max-file-size-mb"
        if size > most:
            raise ValueError(
                f"media source: expected at most {most} bytes of a download ({name}), got {size} "
                "or more"
            )

    def check_addresses(self, host: str, addresses: Iterable[str]) -> None:
        """Refuse a host with a private address, unless it is one of those that are allowed.

        Raises:
            ValueError: names it, and the flag that allows it.
        """
        from sglang.srt.utils import common

        if self.private_hosts or common._allowed_media_domains:  # the host is one of them
            return
        if not all(ipaddress.ip_address(one.split("%")[0]).is_global for one in addresses):
            raise ValueError(
                f"media source: expected a host with public addresses, got {host}; "
                "--allowed-media-domains names the others from which may be fetched"
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

    def check_pixels(self, videos: Iterable[tuple[int, Any]], images: Iterable[Any]) -> None:
        """Refuse a request with too many pixels, before its videos are decoded.

        Args:
            videos: the number of sampled frames of each, and the video.
            images: as SGLang loads them, each of which is a frame.

        Raises:
            ValueError: names the limit's flag.
        """
        pixels = sum(frames * _pixels(*video.frame_shape) for frames, video in videos)
        pixels += sum(_pixels(*_sides(image)) for image in images)
        if pixels > self.request_pixels:
            raise ValueError(
                f"videos and images: expected at most {self.request_pixels} pixels in the sampled "
                "frames of a request, before they are resized (--pevlm-max-request-megapixels), "
                f"got {pixels}; ask for fewer frames or send smaller ones"
            )


def _pixels(height: int, width: int) -> int:
    return height * width


def _sides(image: Any) -> tuple[int, int]:
    """Height and width of a picture of Pillow's, or of a tensor ``[3, height, width]``; none where
    it is processed already."""
    if (shape := getattr(image, "shape", None)) is not None:
        return shape[-2], shape[-1]
    return (image.height, image.width) if hasattr(image, "height") else (0, 0)


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
        if limits.private_hosts or common._allowed_media_domains:
            return
        host = urlparse(url).hostname or ""
        try:
            found = socket.getaddrinfo(host, None)
        except OSError:
            return  # the download says so
        limits.check_addresses(host, [str(address[0]) for *_, address in found])

    return corrected


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def path_of(source: str) -> str | None:
    """The path that SGLang opens as a file: whatever starts like one, and what is one."""
    if source.startswith(_SCHEMES):
        return None
    path = unquote(urlparse(source).path) if source.startswith("file://") else source
    return path if source.startswith(("/", "file://")) or os.path.isfile(path) else None


def size_of(source: Any) -> int:
    """Bytes of a file, or of what a request holds itself; 0 of anything else."""
    if isinstance(source, bytes):
        return len(source)
    if not isinstance(source, str) or source.startswith(("http://", "https://")):
        return 0
    if (path := path_of(source)) is None:
        return len(source) * 3 // 4  # base64
    return os.path.getsize(path) if os.path.isfile(path) else 0
