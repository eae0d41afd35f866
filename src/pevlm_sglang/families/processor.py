"""What the processors of families have in common: the launch check, wishes, sampled frames."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
)
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.runtime_context import get_mm, get_model

from pevlm_sglang.layout import whole_steps
from pevlm_sglang.media import keyframes, pixel_device, told
from pevlm_sglang.media.cache import Clips, MediaCache, tenant
from pevlm_sglang.media.clips import ClipBuffer, Room
from pevlm_sglang.media.download import Downloaded
from pevlm_sglang.media.frame_arrays import FrameArrays
from pevlm_sglang.media.identity import CHANGED, check_unchanged, source_digest, stamp_of
from pevlm_sglang.media.known import KnownVideo, KnownVideos
from pevlm_sglang.media.slices import Reader
from pevlm_sglang.media.sources import SafeSources, check_processed
from pevlm_sglang.media.stages import media_cache, stage
from pevlm_sglang.media.video_file import length_and_rate
from pevlm_sglang.media.wishes import Wishes, split
from pevlm_sglang.settings.config import PevlmConfig

_tenant: ContextVar[Hashable] = ContextVar("pevlm_tenant", default=None)


class VideoProcessor(SafeSources, BaseMultimodalProcessor):
    """Before SGLang's processor of the family in its class's bases.

    Attributes:
        geometry: of the model.
        settings: of the server.
        config: of the server.
        read_elsewhere: see :func:`~pevlm_sglang.media.wishes.split`.
        reader: decodes the videos of all requests.
        cache: what stays prepared.
        clip_steps: steps of a clip, a context block of this server.
        pixel_device: works on their frames, in families that can; None = the CPU does.

    Raises:
        ValueError: a bad ``--mm-process-config``.
    """

    models: list[type] = []  # noqa: RUF012 (found by architecture, see families/registry.py)
    read_elsewhere: Sequence[str] = ()
    video_preprocessing_device = "cpu"  # decode there, as the references do

    def __init__(self, hf_config: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, *args, **kwargs)
        self.geometry = self.geometry_of(hf_config)
        self.settings = self.geometry.settings(self.settings_of(self.video_config))
        self.config = getattr(server_args, "_pevlm_config", None) or PevlmConfig()
        memory = self.config.media_memory_mb << 20
        self.pixel_device = pixel_device.of_server(
            server_args,
            memory,
            keep=self.keep_mm_features_on_device and not self.config.media_cache_mb,
        )
        self.reader = Reader(get_mm().mm_io_worker_num, memory)
        self.cache = MediaCache(self.config.media_cache_mb << 20, media_cache)
        self._known = KnownVideos()
        self.clip_steps = whole_steps(self.config.block_frames, self.geometry.frames_per_step)
        self._processing = ThreadPoolExecutor(1, "pevlm-processor")  # transformers' takes one
        self._dtype = _tower_dtype(hf_config)
        self._prompt_limit: int | None = None

    def shutdown(self) -> None:
        self.reader.shutdown()
        self._processing.shutdown(wait=False, cancel_futures=True)
        super().shutdown()

    def clear_preprocess_cache(self) -> None:
        """With ``/flush_cache``."""
        self.cache.clear()
        self._known.clear()
        super().clear_preprocess_cache()

    @staticmethod
    @abstractmethod
    def geometry_of(hf_config: Any) -> Any:
        """The family's :class:`Geometry` of the model with this configuration."""

    @staticmethod
    def settings_of(video_config: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the server says about videos, from its ``--mm-process-config`` and elsewhere."""
        return video_config

    @classmethod
    def check_launch(cls, hf_config: Any, video_config: Mapping[str, Any]) -> None:
        """Refuse video settings of a server.

        Raises:
            ValueError: see :meth:`Geometry.settings`.
        """
        cls.geometry_of(hf_config).settings(cls.settings_of(video_config))

    def wishes(self, video_data: Sequence[Any] | None) -> tuple[list[Any], list[Wishes]]:
        """The videos of a request as SGLang loads them, those that are known in place of their
        files, and what the request says about each.

        Raises:
            ValueError: a bad wish, or one beyond the server's limits.
        """
        sources, wishes = split(video_data, self.read_elsewhere)
        for wish in wishes:
            wish.check(self.geometry.limits(self.settings))
        if self.cache.enabled:
            sources = [self._known.find(_tenant.get(), source) for source in sources]
        return sources, wishes

    def heeded(self, video: Any, wish: Wishes) -> Wishes:
        """What is wished of a loaded video; see :meth:`FrameArrays.heed`."""
        if not isinstance(video, FrameArrays):
            return wish
        return video.heed(wish, self.geometry.limits(self.settings)["max_frames"])

    async def process_mm_data_async(
        self,
        image_data: Any,
        audio_data: Any = None,
        input_text: Any = "",
        request_obj: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Tokens and items of a request's prompt and media.

        Raises:
            ValueError: what cannot be served, as HTTP 400.
        """
        self.begin(request_obj, **kwargs)
        return await super().process_mm_data_async(
            image_data=image_data,
            audio_data=audio_data,
            input_text=input_text,
            request_obj=request_obj,
            **kwargs,
        )

    def begin(self, request: Any, max_req_input_len: int | None = None, **_: Any) -> None:
        """Refuse what a request says about its media, and this processor does not read.

        Args:
            max_req_input_len: of the server, SGLang's; a prompt has fewer tokens.
        """
        self._prompt_limit = max_req_input_len
        _tenant.set(tenant(request))
        told.check(request)
        for image in getattr(request, "image_data", None) or ():
            check_processed(image)  # a video so is none, see ``wishes``
        for kind in ("image", "video"):
            self.most_tiles(request, kind)

    def most_tiles(self, request: Any, kind: str) -> int:
        """Tiles that a picture of the request may become, see :func:`told.most_tiles`."""
        return told.most_tiles(request, kind, 1, 0)

    def check_length(self, tokens: int) -> None:
        """Refuse media that no prompt holds, before any of them is decoded: a file of some kB can
        become the pixels of as many frames as its request asks for.

        Args:
            tokens: of all media of a prompt.
        """
        if self._prompt_limit is not None and tokens >= self._prompt_limit:
            raise ValueError(
                f"videos and images: expected fewer than {self._prompt_limit} tokens, what a "
                f"prompt may have on this server, got {tokens}; ask for fewer frames or pixels"
            )

    async def prepared(
        self, video: Any, plan: Hashable, read: Callable[[Any], Coroutine[Any, Any, Clips]]
    ) -> Clips:
        """The clips of a video, kept or read.

        Args:
            video: SGLang's ``VideoDecoderWrapper``, or what is known of a file.
            plan: what is made of it.
            read: makes it, of the open video.

        Raises:
            ValueError: a file that cannot be decoded, or that changed in the meantime.
        """

        async def afresh() -> Clips:
            source = getattr(video, "_source", None)
            with source.reading() if isinstance(source, Downloaded) else nullcontext():
                opened = await self.reader.run(self._opened, video)
                clips = await read(opened)
                check_unchanged(opened)
                return clips

        if not self.cache.enabled:
            return await afresh()
        if isinstance(video, KnownVideo):
            digest: bytes | None = video.facts.digest
        else:
            digest = await self.reader.run(source_digest, video)
        if digest is None:
            return await afresh()
        mine = _tenant.get()
        key = (mine, digest, video.frame_shape, self._dtype, plan)
        clips = await self.cache.get(key, afresh)
        if not isinstance(video, KnownVideo):
            check_unchanged(video)  # since the digest
            self._known.remember(mine, video, digest, keyframes.keyframes(video))
        return clips

    def _opened(self, video: Any) -> Any:
        if not isinstance(video, KnownVideo):
            return video
        with stage("fetch"):
            opened = self._load_single_item(video.source, Modality.VIDEO)
        if stamp_of(opened) != video.facts.stamp:
            raise ValueError(CHANGED)
        return opened

    def indices(self, video: Any, settings: Any, wish: Wishes) -> list[int]:
        """Which frames of a video are sampled, ascending, in families that take a number of them.

        Args:
            video: SGLang's ``VideoDecoderWrapper``, or frames in its place.
            settings: for this video.
            wish: see :meth:`heeded`; its numbers are in the settings already.

        Raises:
            ValueError: see :func:`length_and_rate` and :func:`keyframes.in_place_of`.
        """
        if isinstance(video, FrameArrays):
            return list(range(len(video)))
        indices: list[int] = self.geometry.indices(*length_and_rate(video), settings)
        return indices if wish.frames is None else keyframes.in_place_of(video, indices)

    async def sampled(
        self,
        video: Any,
        indices: Sequence[int],
        pixels: Callable[[Image.Image], torch.Tensor],
        *plan: Hashable,
    ) -> Clips:
        """What ``pixels`` makes of each sampled frame of a video; of one that repeats, once.

        Args:
            video: see :meth:`prepared`.
            indices: see :meth:`indices`.
            pixels: ``[3, height, width]`` of a frame, or ``[tiles, 3, height, width]``.
            plan: what else than the frames says what ``pixels`` makes.

        Raises:
            ValueError: see :meth:`prepared`.
        """

        async def read(opened: Any) -> Clips:
            stack = _Stack(indices, pixels, self.clip_steps, self.cache.room)
            await self.reader.read(opened, stack.distinct, stack)
            return stack.clips()

        return await self.prepared(video, (*indices, *plan), read)

    async def process_and_combine_mm_data_async(self, *args: Any, **kwargs: Any) -> Any:
        """As SGLang's, but never on the event loop, which is where that runs on a GPU."""
        with stage("process"):
            if self.mm_processor_executor is not None:
                return await super().process_and_combine_mm_data_async(*args, **kwargs)
            work = partial(self.process_and_combine_mm_data, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(self._processing, work)


class _Stack:
    """What is made of each frame, in clips whose rows are as large as the first frame says.

    Args:
        indices: of the sampled frames.
        pixels: see :meth:`VideoProcessor.sampled`.
        length, room: see :class:`ClipBuffer`.
    """

    def __init__(
        self,
        indices: Sequence[int],
        pixels: Callable[[Image.Image], torch.Tensor],
        length: int,
        room: Room,
    ) -> None:
        self._steps: dict[int, list[int]] = {}  # a frame may be sampled more than once
        for step, index in enumerate(indices):
            self._steps.setdefault(index, []).append(step)
        self.distinct = sorted(self._steps)
        self._pixels = pixels
        self._length, self._room = length, room
        self._lock = Lock()
        self._buffer: ClipBuffer | None = None

    def __call__(self, start: int, frames: torch.Tensor) -> None:
        """See :data:`~pevlm_sglang.media.slices.Work`."""
        for at, frame in enumerate(np.asarray(frames.cpu()), start):
            with stage("process"):
                made = self._pixels(Image.fromarray(frame))
                rows = made if made.ndim == 4 else made[None]
            buffer = self._made(rows)
            for step in self._steps[self.distinct[at]]:
                buffer.step(step).copy_(rows)
                buffer.note(step, rows)

    def _made(self, rows: torch.Tensor) -> ClipBuffer:
        with self._lock:
            if self._buffer is None:
                self._buffer = ClipBuffer(
                    sum(map(len, self._steps.values())),
                    tuple(rows.shape),
                    rows.dtype,
                    self._length,
                    self._room,
                )
            return self._buffer

    def clips(self) -> Clips:
        assert self._buffer is not None  # a video has a frame
        return self._buffer.clips()


def _tower_dtype(hf_config: Any) -> torch.dtype:
    """In which pixels travel: bfloat16, half the bytes, where the tower rounds to it anyway."""
    wanted = str(get_model().dtype)
    if wanted == "auto":
        wanted = str(getattr(hf_config, "dtype", None))
    return torch.bfloat16 if wanted.endswith("bfloat16") else torch.float32
