"""The way of pixels to the scheduler: those that are in shared memory already as another name of
it, others as a copy, made in a thread; and given back in one.

SGLang makes copies on the launcher's event loop, where gigabytes stop every stream for a second
(sglang/srt/managers/tokenizer_manager.py, ``_send_one_request``), and gives them back in the
scheduler's loop, where a gigabyte takes a quarter of one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pevlm_sglang.media import shared
from pevlm_sglang.media.stages import report, stage

_freeing = ThreadPoolExecutor(1, "pevlm-freeing")


async def send(
    upstream: Callable[..., Coroutine[Any, Any, None]], manager: Any, tokenized: Any
) -> None:
    """Send a request to the scheduler, its pixels in shared memory by then.

    Args:
        upstream: SGLang's ``TokenizerManager._send_one_request``, which leaves alone what is in
            shared memory.
        tokenized: the request.
    """
    from sglang.srt.managers.mm_utils import discard_shm_features

    if getattr(tokenized, "mm_inputs", None) is None:
        return await upstream(manager, tokenized)
    copying = asyncio.ensure_future(asyncio.to_thread(_in_shared_memory, tokenized))
    try:
        with stage("transfer"):
            await asyncio.shield(copying)
        report(metrics=manager.enable_metrics)
        await upstream(manager, tokenized)
    except BaseException:  # a client that hung up, for instance: nobody else gives it back
        await asyncio.wait([copying])
        discard_shm_features(tokenized)
        raise


def _in_shared_memory(tokenized: Any) -> None:
    """SGLang's ``wrap_shm_features``, without a copy of what :mod:`pevlm_sglang.media.shared`
    holds."""
    from sglang.srt.managers import mm_utils
    from sglang.srt.runtime_context import get_serving

    if not mm_utils._get_is_default_transport() and not get_serving().skip_tokenizer_init:
        for item in tokenized.mm_inputs.mm_items:
            if isinstance(item.feature, torch.Tensor):
                item.feature = shared.pointer(item.feature) or item.feature
    mm_utils.wrap_shm_features(tokenized)


def release(upstream: Callable[[Any], None], inputs: Any) -> None:
    """Release a request's pixels in the scheduler, those on the host in a thread.

    Args:
        upstream: SGLang's ``MultimodalInputs.release_features``.
        inputs: its ``MultimodalInputs``.
    """
    pixels = [item.feature for item in inputs.mm_items if getattr(item.feature, "is_cpu", False)]
    upstream(inputs)
    if pixels:
        _freeing.submit(pixels.clear)
