"""Media from http and https: streamed to a file that has no name, within the server's limits.

SGLang holds a download in memory, in a thread that a slow sender keeps for as long as it sends a
byte now and then: its deadline is looked at between pieces of 64 KiB. Here a download takes no
thread, ends on its deadline and when its client hangs up, and its bytes lie on disk.
Source: sglang/srt/utils/common.py (``download_remote_media``).
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import ssl
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Self
from urllib.parse import urljoin, urlparse

import aiohttp
import requests
from aiohttp.resolver import ThreadedResolver
from sglang.srt.utils import common
from yarl import URL

from pevlm_sglang.media import limits
from pevlm_sglang.media.slices import all_of
from pevlm_sglang.media.stages import bytes_read, stage

_PIECE = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)


@contextmanager
def _on_the_server() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"a download could not be stored in {tempfile.gettempdir()}: {error.strerror}; make "
            "room there, or set TMPDIR for the server"
        ) from error


class Downloaded(str):
    """Path of a downloaded file. The file has no name, so that nothing is left of it, however this
    process ends: it goes with the last reference to this object, which decoders have, and at the
    latest with its request, unless others wait for what is read from it.

    Attributes:
        size: bytes.
    """

    size: int
    _file: Any
    _hash: Any
    _readers: int
    _ended: bool

    def __new__(cls) -> Self:
        with _on_the_server():
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by __del__)
        made = super().__new__(cls, f"/proc/self/fd/{file.fileno()}")
        made._file, made._hash, made.size = file, hashlib.sha256(), 0
        made._readers, made._ended = 0, False
        return made

    def write(self, piece: bytes) -> None:
        """Append; called in a thread, as both a digest and a disk take their time.

        Raises:
            RuntimeError: the server's disk does not take it.
        """
        with stage("hash"):
            self._hash.update(piece)
        rest = memoryview(piece)
        with _on_the_server():
            while rest:
                rest = rest[self._file.write(rest) :]
        self.size += len(piece)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the file."""
        digest: bytes = self._hash.digest()
        return digest

    def read(self) -> bytes:
        """The whole file."""
        with open(self, "rb") as file:
            return file.read()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """It stays for the block, also beyond its request; used on the loop of that."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if self._ended:
                self.close()

    def close(self) -> None:
        """Its request ended: give its space back."""
        self._ended = True
        if not self._readers:
            self._file.close()

    def __del__(self) -> None:
        self._file.close()


async def fetched(images: Any, videos: Any) -> tuple[Any, Any]:
    """A request's media, those on the web downloaded, all at the same time; their bytes counted.

    Args:
        images, videos: as SGLang takes them: lists of sources, or None.

    Returns:
        The same with the bytes of an image, and with a :class:`Downloaded` in place of a video's
        URL.

    Raises:
        ValueError: what is wrong with a source, or with its size.
        RuntimeError: the server cannot store it.
    """
    if not images and not videos:
        return images, videos
    images, videos = (list(media or ()) for media in (images, videos))
    request = asyncio.current_task()
    found = await all_of(_fetched(medium, request) for medium in (*images, *videos))
    pictures = found[: len(images)]
    if any(isinstance(_url(picture), Downloaded) for picture in pictures):
        pictures = [await asyncio.to_thread(_in_memory, picture) for picture in pictures]
    await asyncio.to_thread(_count, found)
    return pictures or None, found[len(images) :] or None


def _close(file: weakref.ref[Downloaded], _request: Any) -> None:
    if (downloaded := file()) is not None:
        downloaded.close()


async def _fetched(medium: Any, request: Any) -> Any:
    url = _url(medium)
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return medium
    file = await download(url)
    # The traceback of an error may keep it longer than its request.
    request.add_done_callback(partial(_close, weakref.ref(file)))
    return _with(medium, file)


def _url(medium: Any) -> Any:
    """What SGLang's ``VideoData`` or ``ImageData`` names, or the source itself."""
    return getattr(medium, "url", medium)


def _with(medium: Any, source: Any) -> Any:
    if not hasattr(medium, "url"):
        return source
    medium = copy.copy(medium)
    medium.url = source
    return medium


def _in_memory(medium: Any) -> Any:
    source = _url(medium)
    return _with(medium, source.read()) if isinstance(source, Downloaded) else medium


def _count(media: Sequence[Any]) -> None:
    bytes_read(sum(limits.size_of(_url(medium)) for medium in media))


async def download(url: str) -> Downloaded:
    """What is behind an http or https URL.

    Raises:
        ValueError: it is not to be had, or not within the server's limits; names the limit's flag.
        RuntimeError: see :meth:`Downloaded.write`.
    """
    seconds = limits.limits.seconds_to_fetch
    try:
        async with asyncio.timeout(seconds):
            return await _followed(url)
    except TimeoutError as error:
        raise ValueError(
            f"media source: expected all of it within {seconds:g} seconds "
            f"(--pevlm-max-fetch-seconds, REQUEST_TIMEOUT), got less from {_host(url)}"
        ) from error
    except aiohttp.ClientError as error:
        raise ValueError(f"media source: could not be fetched from {_host(url)}: {error}") from (
            error
        )


async def _followed(url: str) -> Downloaded:
    """Through redirects, each of which is checked before a connection is made."""
    resolver = _CheckedResolver()
    connector = aiohttp.TCPConnector(resolver=resolver, ssl=await asyncio.to_thread(_certificates))
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),  # of all redirects together, see above
        trust_env=True,  # proxies, as SGLang
        auto_decompress=False,
        read_bufsize=_PIECE,
    ) as session:
        for _ in range(limits.limits.redirects + 1):
            # The form that SGLang checks is the one that is asked for.
            prepared = requests.Request("GET", url).prepare().url or url
            await asyncio.to_thread(common._assert_media_url_allowed, prepared)
            target = URL(prepared, encoded=True)
            resolver.host = _host(prepared)
            if target.raw_host != resolver.host:
                raise ValueError(f"media source: expected a URL with a host, got {prepared[:100]}")
            async with session.get(
                target, allow_redirects=False, headers={"Accept-Encoding": "identity"}
            ) as response:
                place = response.headers.get("Location")
                if response.status in _REDIRECTS and place:
                    url = urljoin(prepared, place)
                    continue
                if response.status // 100 != 2:
                    raise ValueError(
                        f"media source: expected HTTP 200 from {_host(url)}, got {response.status}"
                    )
                return await _stored(response)
    raise ValueError(
        f"media source: expected at most {limits.limits.redirects} redirects "
        f"(--pevlm-max-redirects), got more from {_host(url)}"
    )


async def _stored(response: aiohttp.ClientResponse) -> Downloaded:
    limits.limits.check_download(response.content_length or 0)
    file = await asyncio.to_thread(Downloaded)
    try:
        async for piece in response.content.iter_chunked(_PIECE):
            limits.limits.check_download(file.size + len(piece))
            writing = asyncio.ensure_future(asyncio.to_thread(file.write, piece))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait([writing])  # a thread writes on
                raise
    except BaseException:
        file.close()
        raise
    return file


class _CheckedResolver(ThreadedResolver):
    """The addresses that are connected to are the ones that are checked: a name server may answer
    otherwise from one question to the next.

    Attributes:
        host: that is asked for; a proxy's addresses are the operator's affair.
    """

    host: str | None = None

    async def resolve(self, host: str, *args: Any, **kwargs: Any) -> Any:
        found = await super().resolve(host, *args, **kwargs)
        if host == self.host:
            limits.limits.check_addresses(host, [one["host"] for one in found])
        return found


@cache
def _certificates() -> ssl.SSLContext:
    """The system's, and those that SGLang's downloads trust."""
    context = ssl.create_default_context()
    context.load_verify_locations(requests.certs.where())
    return context


def _host(url: str) -> str | None:
    return urlparse(url).hostname
