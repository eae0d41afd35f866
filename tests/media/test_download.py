"""Media from the web: on disk and not in memory, within every limit, gone on every way out."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.utils import common

from pevlm_sglang.media import download as module
from pevlm_sglang.media import limits, stages
from pevlm_sglang.media.download import Downloaded, download, fetched
from pevlm_sglang.media.identity import source_digest
from pevlm_sglang.media.limits import Limits

CONTENT = bytes(range(256)) * 10_000  # several pieces


@pytest.fixture(autouse=True)
def own_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch)
    monkeypatch.setattr(common, "_allowed_media_domains", frozenset())


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = nameless()
    yield
    assert nameless() == before


def limit(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    monkeypatch.setattr(limits, "limits", Limits(**values))


def nameless() -> int:
    """Files that this process has open and that have no name."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{number}").endswith("(deleted)")
        except FileNotFoundError:  # of the listing itself
            continue
    return found


# --- A web server that does what it is told -----------------------------------------------------

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def web(**replies: Reply) -> AsyncIterator[SimpleNamespace]:
    """Replies by the first part of a path.

    Yields:
        ``url``, the head of each request in ``asked``, and ``hung_up``, set when a client has gone
        before its reply ended.
    """
    seen = SimpleNamespace(asked=[], hung_up=asyncio.Event(), url="")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            seen.asked.append(head)
            await replies[head.split("/")[1].split("?")[0].split(" ")[0]](writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            seen.hung_up.set()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        seen.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield seen


def answer(content: bytes = CONTENT, status: str = "200 OK", **headers: Any) -> Reply:
    async def reply(writer: asyncio.StreamWriter) -> None:
        lines = {"Content-Length": len(content), "Connection": "close", **headers}
        text = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in lines.items() if v is not None)
        writer.write(f"HTTP/1.1 {status}\r\n{text}\r\n".encode() + content)

    return reply


def redirect(place: str) -> Reply:
    return answer(b"", "302 Found", Location=place)


def slowly(head: bytes) -> Reply:
    """A byte now and then, for ever."""

    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    return reply


async def endless(writer: asyncio.StreamWriter) -> None:
    """Of no declared length."""
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


def get(path: str, **replies: Reply) -> tuple[Downloaded, SimpleNamespace]:
    async def run() -> tuple[Downloaded, SimpleNamespace]:
        async with web(**replies) as seen:
            return await download(seen.url + path), seen

    return asyncio.run(run())


# --- What comes -----------------------------------------------------------------------------


def test_a_file_without_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Readable by its path, known by its content, and gone with the last who has it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file, _ = get("/clip", clip=answer())
    assert os.listdir(tmp_path) == []
    with open(file, "rb") as opened:
        assert opened.read() == CONTENT == file.read()
    del opened  # which knows its name
    assert file.size == len(CONTENT)
    digest = hashlib.sha256(CONTENT).digest()
    assert source_digest(SimpleNamespace(_source=file)) == file.digest == digest
    path = str.__str__(file)
    holder = SimpleNamespace(_source=file)
    del file
    assert os.path.isfile(path)
    del holder
    assert not os.path.isfile(path)


def test_asked_for_as_the_client_wrote_it() -> None:
    """A signature of a URL is over its letters; and what comes packed cannot be bounded."""
    path = "/clip?key=a%2Fb%3D&other=%C3%A9+x"
    _, seen = get(path, clip=answer())
    [head] = seen.asked
    assert head.startswith(f"GET {path} HTTP/1.1")
    assert "Accept-Encoding: identity" in head


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (answer(b"", "404 Not Found"), r"expected HTTP 200 from 127.0.0.1, got 404"),
        (answer(b"", "503 Busy"), "got 503"),
        (answer(b"12", Content_Length=3), "could not be fetched from 127.0.0.1"),
    ],
)
def test_what_is_not_to_be_had(reply: Reply, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        get("/clip", clip=reply)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match="could not be fetched from 127"):
        asyncio.run(download(f"http://127.0.0.1:{port}/clip"))


@pytest.mark.parametrize("url", ["http://", "http:///x", "http://[::1", "ftp://host/x"])
def test_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        asyncio.run(download(url))


# --- Limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [answer(b"x" * 5001), endless], ids=["declared", "endless"])
@pytest.mark.parametrize("flag", ["--pevlm-max-source-mb", "--media-url-max-file-size-mb"])
def test_too_large(flag: str, reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    of_sglang = 5000 if "url" in flag else 0
    monkeypatch.setattr(common, "_media_url_max_file_size_bytes", of_sglang)
    limit(monkeypatch, source_bytes=9000 if of_sglang else 5000)
    written: list[int] = []
    write = Downloaded.write
    monkeypatch.setattr(
        Downloaded, "write", lambda file, piece: (written.append(len(piece)), write(file, piece))
    )
    with pytest.raises(ValueError, match=rf"at most 5000 bytes of a download \({flag}\), got"):
        get("/clip", clip=reply)
    assert sum(written) <= 5000
    get("/clip", clip=answer(b"x" * 5000))


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "]
)
def test_too_slow(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a byte comes, of the head or of the body."""
    limit(monkeypatch, fetch_seconds=0.3)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"within 0.3 seconds \(--pevlm-max-fetch-seconds"):
        get("/clip", clip=slowly(head))
    assert time.perf_counter() - began < 2
    limit(monkeypatch)
    monkeypatch.setenv("REQUEST_TIMEOUT", "0.2")
    with pytest.raises(ValueError, match=r"within 0.2 seconds"):
        get("/clip", clip=slowly(head))


def test_redirects(monkeypatch: pytest.MonkeyPatch) -> None:
    way = {"a": redirect("/b"), "b": redirect("c/d?e=f"), "c": answer()}
    limit(monkeypatch, redirects=2)
    file, seen = get("/a", **way)
    assert file.size == len(CONTENT)
    del file
    assert [head.split(" ")[1] for head in seen.asked] == ["/a", "/b", "/c/d?e=f"]
    limit(monkeypatch, redirects=1)
    with pytest.raises(ValueError, match=r"at most 1 redirects \(--pevlm-max-redirects\)"):
        get("/a", **way)


def test_redirect_to_what_is_no_web() -> None:
    with pytest.raises(ValueError, match="Invalid media URL"):
        get("/a", a=redirect("file:///etc/passwd"))


def test_redirect_to_a_private_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for before a connection is made; the first host counts as public here."""
    monkeypatch.setattr(common, "_assert_media_url_allowed", common._assert_media_url_allowed)
    limits.install(limits.PevlmConfig(), "0.0.0.0")
    check = Limits.check_addresses

    def but_loopback(self: Limits, host: str, addresses: Any) -> None:
        if host != "127.0.0.1":
            check(self, host, addresses)

    monkeypatch.setattr(Limits, "check_addresses", but_loopback)
    with pytest.raises(ValueError, match="host with public addresses, got 169"):
        get("/a", a=redirect("http://169.254.169.254/latest"))


def test_a_name_server_that_changes_its_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public when it is asked about, private when it is connected to."""
    monkeypatch.setattr(common, "_assert_media_url_allowed", common._assert_media_url_allowed)
    limits.install(limits.PevlmConfig(), "0.0.0.0")
    answers = ["93.184.215.14", "127.0.0.1"]

    def find(host: str, port: Any, *_: Any, **__: Any) -> Any:
        assert host == "turning.example"
        address = answers.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", find)

    async def run() -> None:
        async with web(clip=answer()) as seen:
            url = seen.url.replace("127.0.0.1", "turning.example")
            with pytest.raises(ValueError, match="public addresses, got turning"):
                await download(f"{url}/clip")
            assert not seen.asked

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:  # uvloop asks by itself
        runner.run(run())
    assert not answers


# --- Ways out ---------------------------------------------------------------------------------


def test_a_client_that_hangs_up() -> None:
    """Ends the connection at once."""

    async def run() -> None:
        async with web(clip=slowly(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")) as seen:
            task = asyncio.ensure_future(download(f"{seen.url}/clip"))
            while not seen.asked:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(seen.hung_up.wait(), 2)

    asyncio.run(run())


def test_a_full_disk_is_the_server_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.fileno, self.close = file.fileno, file.close

        def write(self, piece: Any) -> int:
            raise OSError(28, "No space left on device")

    def none(**_: Any) -> None:
        raise OSError(24, "Too many open files")

    made = tempfile.TemporaryFile
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", none)
        with pytest.raises(RuntimeError, match=r"stored in .*: Too many open files"):
            get("/clip", clip=answer())
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **kwargs: Full(made(**kwargs)))
    with pytest.raises(RuntimeError, match=r"stored in .*: No space left on device; .*TMPDIR"):
        get("/clip", clip=answer())


def test_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest and disk are a thread's work."""
    write = Downloaded.write

    def slow(file: Downloaded, piece: bytes) -> None:
        time.sleep(0.3)
        write(file, piece)

    monkeypatch.setattr(Downloaded, "write", slow)
    from support.processor import longest_pause

    async def run() -> float:
        async with web(clip=answer()) as seen:
            return await longest_pause(download(f"{seen.url}/clip"))

    assert asyncio.run(run()) < 0.2


# --- A request's media --------------------------------------------------------------------------


def test_media_of_a_request(tmp_path: Any) -> None:
    """Pictures in memory, videos on disk; and the bytes of all are counted."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"x" * 100)

    async def run() -> tuple[Any, Any, Any]:
        async with web(clip=answer(), picture=answer(b"picture")) as seen:
            picture = SimpleNamespace(url=f"{seen.url}/picture", detail="low")
            stages._current.set(None)
            request = stages.begin()
            found = await fetched(
                [picture, "data:image/png;base64,AAAA"],
                [f"{seen.url}/clip", str(path), b"1234", SimpleNamespace(url=f"{seen.url}/clip")],
            )
            assert picture.url.startswith("http"), "the request's own is left as it is"
            return (*found, request)

    images, videos, request = asyncio.run(run())
    assert (images[0].url, images[0].detail) == (b"picture", "low")
    assert images[1] == "data:image/png;base64,AAAA"
    assert [*videos[1:3]] == [str(path), b"1234"]
    assert isinstance(videos[0], Downloaded)
    assert isinstance(videos[3].url, Downloaded)
    assert request.bytes == 2 * len(CONTENT) + len(b"picture") + 19 + 100 + 4
    assert "hash" in request.seconds
    assert asyncio.run(fetched(None, [])) == (None, [])


def test_a_request_s_files_end_with_it() -> None:
    """Though an error, say, has kept them."""
    kept: list[Any] = []

    async def run() -> None:
        async with web(clip=answer(), gone=slow_404) as seen:
            _, videos = await fetched(None, [f"{seen.url}/clip"])
            kept.append(videos)
            assert os.path.isfile(videos[0])
            with pytest.raises(ValueError, match="got 404") as error:
                await fetched(None, [f"{seen.url}/clip", f"{seen.url}/gone"])
            kept.append(error)

    async def slow_404(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await answer(b"", "404 Not Found")(writer)

    before = nameless()
    asyncio.run(run())
    assert len(kept) == 2
    assert nameless() == before


def test_one_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slowly(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    asked: list[str] = []

    async def gone(writer: asyncio.StreamWriter) -> None:
        while len(asked) < 2:
            await asyncio.sleep(0.01)
        await answer(b"", "404 Not Found")(writer)

    async def run() -> None:
        async with web(slow=slow, gone=gone) as seen:
            seen.asked = asked
            with pytest.raises(ValueError, match="got 404"):
                await fetched(None, [f"{seen.url}/slow", f"{seen.url}/gone"])
            await asyncio.wait_for(seen.hung_up.wait(), 2)

    asyncio.run(run())


def test_the_certificates_are_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._certificates().cert_store_stats()["x509_ca"] > 0
