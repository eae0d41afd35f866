"""What a request may have the server open."""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("sglang")

from sglang.srt.utils import common

from pevlm_sglang.media import limits
from pevlm_sglang.media.limits import Limits
from pevlm_sglang.media.video_file import length_and_rate
from pevlm_sglang.settings.config import PevlmConfig

ELSEWHERE = "0.0.0.0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``allowed/clip.mp4``, ``secret.mp4`` and a link from one to the other."""
    allowed = tmp_path / "allowed"
    (allowed / "deep").mkdir(parents=True)
    (tmp_path / "allowed-too").mkdir()
    for name in ("allowed/a clip.mp4", "allowed/deep/clip.mp4", "secret", "allowed-too/clip.mp4"):
        (tmp_path / name).write_bytes(b"content")
    (allowed / "link.mp4").symlink_to(tmp_path / "secret")
    return tmp_path


def of(paths: str = "", host: str | None = ELSEWHERE, **options: Any) -> Limits:
    return Limits.of(PevlmConfig(media_paths=paths, **options), host)


# --- Paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "127.8.8.8", None])
def test_own_machine_may_name_any_file(folder: Path, host: str | None) -> None:
    of(host=host).check_source(str(folder / "secret"))


@pytest.mark.parametrize("host", [ELSEWHERE, "::", "10.0.0.1", "example.com", ""])
def test_others_may_name_none(folder: Path, host: str) -> None:
    for source in (str(folder / "secret"), f"file://{folder}/secret", "/no/such", "/dev/zero"):
        with pytest.raises(
            ValueError, match=r"media source: expected no path, got /.*--pevlm-media"
        ):
            of(host=host).check_source(source)


@pytest.mark.parametrize("host", [ELSEWHERE, "127.0.0.1"])
def test_directories(folder: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, dots and look-alikes do not lead out of them."""
    allowed = folder / "allowed"
    checked = of(f"{allowed}{os.pathsep}{folder}/no-such", host)
    monkeypatch.chdir(folder)
    for inside in (
        str(allowed / "a clip.mp4"),
        f"file://{allowed}/a%20clip.mp4",
        f"{allowed}/deep/../deep/clip.mp4",
        "allowed/deep/clip.mp4",
        SimpleNamespace(url=str(allowed / "a clip.mp4")),
    ):
        checked.check_source(inside)
    for outside in (
        str(folder / "secret"),
        f"{allowed}/../secret",
        f"file://{allowed}/%2e%2e/secret",
        str(allowed / "link.mp4"),
        str(folder / "allowed-too" / "clip.mp4"),
        "secret",
        "/proc/self/environ",
        SimpleNamespace(url="/etc/passwd"),
    ):
        with pytest.raises(ValueError, match=r"media source: expected a file below .*allowed, "):
            checked.check_source(outside)


def test_everything_on_request(folder: Path) -> None:
    of("/").check_source(str(folder / "secret"))


def test_what_is_no_path_is_left_alone() -> None:
    checked = of()
    for source in ("data:video/mp4;base64,AAAA", "https://host/x", b"bytes", None, [b"frame"]):
        checked.check_source(source)
    checked.check_source(base64.b64encode(b"x" * 5000).decode())


# --- Sizes -----------------------------------------------------------------------------------


def test_every_limit_of_the_server_is_set() -> None:
    """From its flag, and from nowhere else."""
    options = {
        "max_source_mb": 1,
        "max_fetch_seconds": 2,
        "max_redirects": 3,
        "max_video_seconds": 4,
        "max_frame_megapixels": 5,
        "max_request_megapixels": 6,
    }
    mib = 1 << 20
    assert of("/", **options) == Limits(("/",), False, mib, 2, 3, 4, 5 * mib, 6 * mib)
    assert of(host=None) == Limits()


def test_size_of_a_source(folder: Path) -> None:
    large, checked = b"x" * ((1 << 20) + 3), of("/", max_source_mb=1)
    path = folder / "large"
    path.write_bytes(large)
    encoded = base64.b64encode(large).decode()
    for source in (large, str(path), f"file://{path}", encoded, f"data:video/mp4;base64,{encoded}"):
        with pytest.raises(ValueError, match=r"at most 1048576 bytes \(--pevlm-max-source-mb\)"):
            checked.check_source(source)
    path.write_bytes(large[: 1 << 20])
    checked.check_source(str(path))


class Video:
    frame_shape = (1024, 2048)
    avg_fps = 10.0

    def __init__(self, frames: int) -> None:
        self._frames = frames

    def __len__(self) -> int:
        return self._frames


def test_size_of_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "limits", of(max_video_seconds=60, max_frame_megapixels=2))
    assert length_and_rate(Video(600)) == (600, 10.0)
    with pytest.raises(ValueError, match=r"at most 60 seconds .--pevlm-max-video-seconds., got 61"):
        length_and_rate(Video(610))
    monkeypatch.setattr(limits, "limits", of(max_frame_megapixels=1))
    with pytest.raises(ValueError, match=r"at most 1048576 pixels .--pevlm-max-frame-megapixels"):
        length_and_rate(Video(600))


def test_pixels_of_a_request() -> None:
    """Of all its media together, as they are in their files."""
    checked = of(max_request_megapixels=10)
    video, picture = Video(600), Image.new("RGB", (2048, 512))  # 2 and 1 of them
    videos = [(2, video), (1, video)]
    images = [picture, torch.zeros(3, 512, 2048), {"format": "processor_output"}]
    checked.check_pixels(videos, [*images, picture, picture])
    expected = (
        r"at most 10485760 pixels .* \(--pevlm-max-request-megapixels\), got 11534336; ask for"
    )
    for much in ((videos, [picture] * 5), ([*videos, (2, video)], [torch.zeros(3, 512, 2048)])):
        with pytest.raises(ValueError, match=expected):
            checked.check_pixels(*much)


# --- Hosts -----------------------------------------------------------------------------------


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names have addresses here; what is installed is taken off again."""
    addresses = {
        "public.example": ["93.184.215.14", "2606:2800:21f:cb07::1"],
        "inside.example": ["10.1.2.3"],
        "half.example": ["93.184.215.14", "169.254.169.254"],
        "mapped.example": ["::ffff:127.0.0.1"],
        "scoped.example": ["fe80::1%eth0"],
    }

    def find(host: str, port: Any) -> Any:
        if host not in addresses and not host[0].isdigit():
            raise OSError("no such host")
        return [(0, 0, 0, "", (address, 0)) for address in addresses.get(host, [host])]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setattr(limits, "limits", limits.limits)
    monkeypatch.setattr(common, "_allowed_media_domains", frozenset())
    monkeypatch.setattr(common, "_assert_media_url_allowed", common._assert_media_url_allowed)


PRIVATE = [
    "http://inside.example/x",
    "http://half.example/x",
    "http://mapped.example/x",
    "http://scoped.example/x",
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:8000/x",
    "http://192.168.0.1/x",
]


@pytest.mark.usefixtures("resolved")
@pytest.mark.parametrize("url", PRIVATE)
def test_private_addresses(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of redirects too: SGLang asks before each of them."""
    limits.install(PevlmConfig(), ELSEWHERE)
    with pytest.raises(ValueError, match="expected a host with public addresses, got"):
        common._assert_media_url_allowed(url)
    with pytest.raises(ValueError, match="expected a host with public addresses, got"):
        common.download_remote_media(url, timeout=1)
    host = common._normalize_media_domain(common.urlparse(url).hostname)
    monkeypatch.setattr(common, "_allowed_media_domains", frozenset({host}))
    common._assert_media_url_allowed(url)
    monkeypatch.setattr(common, "_allowed_media_domains", frozenset())
    limits.install(PevlmConfig(), "127.0.0.1")
    common._assert_media_url_allowed(url)


@pytest.mark.usefixtures("resolved")
def test_public_addresses() -> None:
    limits.install(PevlmConfig(), ELSEWHERE)
    common._assert_media_url_allowed("https://public.example/x")
    common._assert_media_url_allowed("https://nowhere.example/x")  # the download says so
    with pytest.raises(ValueError, match="Invalid media URL"):
        common._assert_media_url_allowed("ftp://public.example/x")
