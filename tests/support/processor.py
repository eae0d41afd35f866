"""SGLang's multimodal processor of a model, in this process: no server, no weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from pevlm_sglang.settings.config import PevlmConfig


def without_pinned_memory() -> Any:
    """SGLang pins frames outside its CPU platform; a CUDA build of torch cannot without a GPU."""
    return mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)


class Processor:
    """Args:
    processor: SGLang's, or this plugin's.
    """

    def __init__(self, processor: Any) -> None:
        self.sglang = processor

    def __call__(
        self, text: str, videos: Sequence[Any] = (), images: Sequence[Any] = (), **fields: Any
    ) -> Any:
        """SGLang's ``MultimodalProcessorOutput`` of a prompt; ``videos`` as in ``video_data``,
        ``fields`` further ones of a request."""
        with without_pinned_memory():
            return asyncio.run(self.process(text, videos, images, **fields))

    async def process(
        self, text: str, videos: Sequence[Any] = (), images: Sequence[Any] = (), **fields: Any
    ) -> Any:
        """The same, on a loop that runs."""
        media = {"image_data": [*images] or None, "video_data": [*videos] or None}
        request = SimpleNamespace(**media, audio_data=None, rid="test", **fields)
        return await self.sglang.process_mm_data_async(
            image_data=request.image_data, input_text=text, request_obj=request
        )


def in_the_scheduler(output: Any) -> Any:
    """A processor's output as SGLang's ``MultimodalInputs``.

    Raises:
        AssertionError: the scheduler would hash pixels, while nothing decodes.
    """
    from sglang.srt.managers import mm_utils
    from sglang.srt.managers.schedule_batch import MultimodalInputs

    with mock.patch.object(mm_utils, "hash_feature", side_effect=AssertionError("hashed")):
        return MultimodalInputs.from_processor_output(output)


async def longest_pause(work: Awaitable[Any]) -> float:
    """Seconds for which an event loop does nothing else than this work, at most."""
    longest, last = 0.0, time.perf_counter()
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.sleep(0.002)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await task
    return longest


@contextmanager
def sglang_processor(
    processor_class: type,
    hf_config: Any,
    hf_processor: Any,
    *,
    video: Mapping[str, Any] | None = None,
    pevlm: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Iterator[Processor]:
    """A processor as a server's launcher builds it.

    Args:
        processor_class: SGLang's or this plugin's.
        hf_config: of the model.
        hf_processor: transformers' one.
        video: the ``video`` section of ``--mm-process-config``.
        pevlm: options of this plugin.
        attributes: of the server's arguments, that the launcher leaves there.
    """
    from sglang.srt.runtime_context import get_context

    context = get_context()
    with context.override_server_args(
        mm_process_config={"video": dict(video or {})},
    ) as server_args:
        server_args._pevlm_config = PevlmConfig(**(pevlm or {}))
        vars(server_args).update(attributes or {})
        with without_pinned_memory():
            processor: Any = processor_class(
                hf_config, server_args, hf_processor, "default", skip_mm_pool=True
            )
        try:
            yield Processor(processor)
        finally:
            processor.shutdown()
