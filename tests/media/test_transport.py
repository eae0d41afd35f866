"""Pixels go to the scheduler in shared memory, which no event loop waits for and nobody leaks."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.managers import mm_utils
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_params import SamplingParams

from pevlm_sglang.media import shared, transport

MANAGER = SimpleNamespace(enable_metrics=False)


@pytest.fixture(autouse=True)
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a server of one machine."""
    monkeypatch.setattr(mm_utils, "_get_is_default_transport", lambda: False)
    with get_context().override_server_args():
        yield


def request(pixels: torch.Tensor | None) -> Any:
    inputs = None
    if pixels is not None:
        item = MultimodalDataItem(modality=Modality.VIDEO, feature=pixels, hash=7)
        inputs = MultimodalProcessorOutput(input_ids=[1], mm_items=[item])
    return TokenizedGenerateReqInput(
        input_text=None,
        input_ids=None,
        input_embeds=None,
        mm_inputs=inputs,
        token_type_ids=None,
        sampling_params=SamplingParams(),
        return_logprob=False,
        logprob_start_len=0,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )


def exists(pointer: Any) -> bool:
    try:
        handle = mm_utils.shared_memory.SharedMemory(name=pointer.shm_name)
    except FileNotFoundError:
        return False
    handle.close()
    return True


def test_pixels_are_copied_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    where = []
    made = mm_utils.ShmPointerMMData.__init__

    def watched(*args: Any, **kwargs: Any) -> None:
        where.append(threading.current_thread())
        made(*args, **kwargs)

    monkeypatch.setattr(mm_utils.ShmPointerMMData, "__init__", watched)
    pixels, sent = torch.arange(12.0).view(3, 4), []

    async def upstream(manager: Any, tokenized: Any) -> None:
        sent.append(mm_utils.wrap_shm_features(tokenized))  # as SGLang does

    tokenized = request(pixels)
    asyncio.run(transport.send(upstream, MANAGER, tokenized))
    assert sent == [tokenized]
    assert len(where) == 1
    assert where[0] is not threading.main_thread()
    pointer = tokenized.mm_inputs.mm_items[0].feature
    assert pointer.precomputed_hash == 7  # and the scheduler hashes nothing
    pointer.__setstate__(pointer.__getstate__())
    assert torch.equal(pointer.materialize(), pixels)
    assert not exists(pointer)


def test_pixels_are_given_back_in_a_thread() -> None:
    """By the last who has them, whatever SGLang does with them before."""
    where, released = [], []

    class Pixels:
        is_cpu = True

        def __del__(self) -> None:
            where.append(threading.current_thread())

    inputs = SimpleNamespace(mm_items=[SimpleNamespace(feature=f) for f in (Pixels(), None)])

    def upstream(inputs: Any) -> None:
        released.append(inputs)
        for item in inputs.mm_items:
            item.feature = None

    transport.release(upstream, inputs)
    transport._freeing.submit(int).result()  # after it
    assert released == [inputs]
    assert len(where) == 1
    assert where[0] is not threading.main_thread()


def test_pixels_in_shared_memory_are_not_copied() -> None:
    """A request takes a name of them along, which is its own to remove."""
    pixels = shared.empty((3, 4), torch.float32)
    pixels.copy_(torch.arange(12.0).view(3, 4))

    async def upstream(manager: Any, tokenized: Any) -> None:
        mm_utils.wrap_shm_features(tokenized)  # as SGLang does

    pointers = []
    for _ in range(2):
        tokenized = request(pixels)
        asyncio.run(transport.send(upstream, MANAGER, tokenized))
        pointers.append(tokenized.mm_inputs.mm_items[0].feature)
    inodes = {os.stat(f"/dev/shm/{pointer.shm_name}").st_ino for pointer in pointers}
    assert inodes == {os.stat(f"/dev/shm/{pixels._pevlm_shared_memory}").st_ino}
    for pointer in pointers:
        pointer.__setstate__(pointer.__getstate__())
        assert torch.equal(pointer.materialize(), pixels)
        assert not exists(pointer)


def test_text_is_sent_at_once() -> None:
    sent: list[Any] = []

    async def upstream(manager: Any, tokenized: Any) -> None:
        sent.append((manager, tokenized))

    tokenized = request(None)
    sending = transport.send(upstream, "manager", tokenized)
    with pytest.raises(StopIteration):
        sending.send(None)  # awaits nothing
    assert sent == [("manager", tokenized)]


def test_nothing_is_left_of_a_request_that_was_not_sent() -> None:
    async def upstream(manager: Any, tokenized: Any) -> None:
        raise OSError("no scheduler")

    tokenized = request(torch.ones(8))
    with pytest.raises(OSError, match="no scheduler"):
        asyncio.run(transport.send(upstream, MANAGER, tokenized))
    assert not exists(tokenized.mm_inputs.mm_items[0].feature)


def test_nothing_is_left_of_a_client_that_hung_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the pixels were copied: the thread goes on, and nobody else knows of it."""
    wrap = mm_utils.wrap_shm_features

    def slow(tokenized: Any) -> Any:
        time.sleep(0.2)
        return wrap(tokenized)

    monkeypatch.setattr(mm_utils, "wrap_shm_features", slow)
    tokenized = request(torch.ones(8))

    async def upstream(manager: Any, tokenized: Any) -> None:
        raise AssertionError("sent")

    async def hang_up() -> None:
        sending = asyncio.ensure_future(transport.send(upstream, MANAGER, tokenized))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    asyncio.run(hang_up())
    pointer = tokenized.mm_inputs.mm_items[0].feature
    assert isinstance(pointer, mm_utils.ShmPointerMMData)
    assert not exists(pointer)
