"""What the processors of families have in common: the launch check, wishes, sampled frames; and a
whole processor for families whose prompt is tokens between placeholders."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.runtime_context import get_mm, get_model

from pevlm_sglang.media import keyframes, pixel_device, told
from pevlm_sglang.media.frame_arrays import FrameArrays
from pevlm_sglang.media.identity import check_unchanged, identity, pixels_digest, source_digest
from pevlm_sglang.media.slices import Reader, Work, all_of
from pevlm_sglang.media.sources import SafeSources, check_processed
from pevlm_sglang.media.stages import stage
from pevlm_sglang.media.video_file import length_and_rate
from pevlm_sglang.media.wishes import Wishes, split
from pevlm_sglang.settings.config import PevlmConfig


class VideoProcessor(SafeSources, BaseMultimodalProcessor):
    """Before SGLang's processor of the family in its class's bases.

    Attributes:
        geometry: of the model.
        settings: of the server.
        config: of the server.
        read_elsewhere: see :func:`~pevlm_sglang.media.wishes.split`.
        reader: decodes the videos of all requests.
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
            server_args, memory, keep=self.keep_mm_features_on_device
        )
        self.reader = Reader(get_mm().mm_io_worker_num, memory)
        self._processing = ThreadPoolExecutor(1, "pevlm-processor")  # transformers' takes one
        self._dtype = _tower_dtype(hf_config)
        self._prompt_limit: int | None = None

    def shutdown(self) -> None:
        self.reader.shutdown()
        self._processing.shutdown(wait=False, cancel_futures=True)
        super().shutdown()

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
        """The videos of a request as SGLang loads them, and what it says about each.

        Raises:
            ValueError: a bad wish, or one beyond the server's limits.
        """
        sources, wishes = split(video_data, self.read_elsewhere)
        for wish in wishes:
            wish.check(self.geometry.limits(self.settings))
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

    async def read(
        self, video: Any, indices: Sequence[int], work: Work, *, multiple: int = 1
    ) -> bytes | None:
        """Read a video in slices, see :meth:`~pevlm_sglang.media.slices.Reader.read`.

        Returns:
            The digest of its file; None where there is none.

        Raises:
            ValueError: a file that cannot be decoded, or that changed in the meantime.
        """
        digest: bytes | None
        digest, _ = await all_of(
            (
                self.reader.run(source_digest, video),
                self.reader.read(video, indices, work, multiple=multiple),
            )
        )
        check_unchanged(video)
        return digest

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
        self, video: Any, indices: Sequence[int], pixels: Callable[[Image.Image], torch.Tensor]
    ) -> tuple[torch.Tensor, Any]:
        """What ``pixels`` makes of each sampled frame of a video, stacked; of one that repeats,
        once.

        Args:
            video: SGLang's ``VideoDecoderWrapper``.
            indices: see :meth:`indices`.

        Returns:
            ``[frames, …]``, and a digest of what they are made of; None where there is no file.

        Raises:
            ValueError: see :meth:`read`.
        """
        distinct = sorted(set(indices))
        stack = _Stack(len(distinct), pixels)
        digest = await self.read(video, distinct, stack)
        source = None if digest is None else (digest, indices)
        if len(distinct) == len(indices):
            return stack.rows, source
        place = {index: at for at, index in enumerate(distinct)}
        return stack.rows[[place[index] for index in indices]], source

    async def process_and_combine_mm_data_async(self, *args: Any, **kwargs: Any) -> Any:
        """As SGLang's, but never on the event loop, which is where that runs on a GPU."""
        with stage("process"):
            if self.mm_processor_executor is not None:
                return await super().process_and_combine_mm_data_async(*args, **kwargs)
            work = partial(self.process_and_combine_mm_data, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(self._processing, work)


class _Stack:
    """What is made of each frame, in one tensor that is as large as the first of them says."""

    def __init__(self, count: int, pixels: Callable[[Image.Image], torch.Tensor]) -> None:
        self._count, self._pixels = count, pixels
        self._lock = Lock()
        self.rows = torch.empty(0)

    def __call__(self, start: int, frames: torch.Tensor) -> None:
        """See :data:`~pevlm_sglang.media.slices.Work`."""
        for at, frame in enumerate(np.asarray(frames.cpu()), start):
            with stage("process"):
                made = self._pixels(Image.fromarray(frame))
            with self._lock:
                if not len(self.rows):
                    self.rows = torch.empty(self._count, *made.shape, dtype=made.dtype)
            self.rows[at] = made


@dataclass(frozen=True)
class Medium:
    """A video, an image or a frame of a list, preprocessed.

    Attributes:
        pixels: ``[frames or tiles, 3, height, width]``.
        runs: of placeholders, each of ``tokens``.
        before, after: tokens of the text around each run.
        data: what the spans and the model have to know beside the pixels.
        source: what the pixels were made of, a digest of the video's file say; None = a digest of
            themselves.
        identity: by which SGLang's caches know it. The same pixels may have other features as a
            frame and as a picture, so it is more than the source.
    """

    modality: Modality
    pixels: torch.Tensor
    tokens: int
    runs: int = 1
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    source: Any = None
    identity: int = field(init=False)

    def __post_init__(self) -> None:
        source = self.source or pixels_digest(self.pixels)
        made = (self.modality.name, self.pixels.dtype, tuple(self.pixels.shape), dict(self.data))
        object.__setattr__(self, "identity", identity(source, made))


class PlaceholderProcessor(VideoProcessor):
    """Tokens of a prompt between placeholders, each of which becomes what its medium needs.

    Attributes:
        placeholders: what stands for an image or video in a text.
        token_ids: of the expanded placeholders.
    """

    gpu_image_decode = False  # PIL images, as in the references
    placeholders: Mapping[Modality, str] = {Modality.IMAGE: "<image>", Modality.VIDEO: "<video>"}
    token_ids: Mapping[Modality, int]

    @abstractmethod
    def image(self, image: Image.Image, kind: str, *, alone: bool) -> Medium:
        """An image.

        Args:
            kind: ``image``, ``multi-images`` or ``video`` (a frame of one), as the request says.
            alone: whether it is the only picture of the prompt.
        """

    @abstractmethod
    async def video(self, video: Any, indices: Sequence[int]) -> Medium:
        """A video; see :meth:`sampled`."""

    @abstractmethod
    def video_tokens(self, frames: int) -> int:
        """Placeholders of a video."""

    def tokenize(
        self, prompt: str | Sequence[int], images: int, videos: int
    ) -> tuple[list[list[int]], list[Modality]]:
        """The tokens around the placeholders, one piece more than those, and their kinds."""
        ids = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        known = {token: kind for kind, token in self.token_ids.items()}
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token in known:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return pieces, [known[token] for token in ids if token in known]

    async def process_mm_data_async(
        self,
        image_data: Sequence[Any] | None,
        audio_data: Sequence[Any] | None = None,
        input_text: str | Sequence[int] = "",
        request_obj: Any = None,
        **kwargs: Any,
    ) -> MultimodalProcessorOutput:
        """Expand a request's placeholders, and preprocess what they stand for.

        Raises:
            ValueError: a medium that cannot be read, a wish that cannot be met, or placeholders
                that do not fit the media.
        """
        self.begin(request_obj, **kwargs)
        videos, wishes = self.wishes(request_obj.video_data)
        images = list(image_data or ())
        if any(isinstance(image, dict) for image in images):
            raise ValueError(
                "image_data: expected a file, URL or bytes, got a dict; features that "
                "are processed already are not taken"
            )
        pieces, order = self.tokenize(input_text, len(images), len(videos))
        for kind, given in ((Modality.IMAGE, images), (Modality.VIDEO, videos)):
            if order.count(kind) != len(given):
                raise ValueError(
                    f"prompt: expected {len(given)} of {self.placeholders[kind]}, one for each "
                    f"{kind.name.lower()}, got {order.count(kind)}"
                )
        with stage("fetch"):
            loaded = await self.fast_load_mm_data("", self.mm_tokens, images, videos)
        heeded = list(map(self.heeded, loaded.videos, wishes))
        sampled = [
            self.indices(video, self.settings.wished(wish), wish)
            for video, wish in zip(loaded.videos, heeded, strict=True)
        ]
        self.check_length(sum(self.video_tokens(len(indices)) for indices in sampled))
        kinds = _image_kinds(getattr(request_obj, "modalities", None), len(images))
        alone = len(images) == 1 and not videos
        work: list[Coroutine[Any, Any, Medium]] = [
            self.reader.run(partial(self.image, image, kind, alone=alone))
            for image, kind in zip(loaded.images, kinds, strict=True)
        ]
        for video, indices in zip(loaded.videos, sampled, strict=True):
            work.append(self.video(video, indices))
        media = await all_of(work)
        rest = {
            Modality.IMAGE: iter(media[: len(images)]),
            Modality.VIDEO: iter(media[len(images) :]),
        }
        return self._expand(pieces, [(kind, next(rest[kind])) for kind in order])

    def _expand(
        self, pieces: Sequence[Sequence[int]], media: Sequence[tuple[Modality, Medium]]
    ) -> MultimodalProcessorOutput:
        ids = list(pieces[0])
        items = []
        for (kind, medium), piece in zip(media, pieces[1:], strict=True):
            offsets = []
            for _ in range(medium.runs):
                ids += medium.before
                offsets.append((len(ids), len(ids) + medium.tokens - 1))  # inclusive at the end
                ids += [self.token_ids[kind]] * medium.tokens
                ids += medium.after
            ids += piece
            items.append(
                MultimodalDataItem(
                    modality=medium.modality,
                    hash=medium.identity,
                    feature=medium.pixels,
                    offsets=offsets,
                    model_specific_data=dict(medium.data),
                )
            )
        return MultimodalProcessorOutput(
            input_ids=ids,
            mm_items=self._finalize_mm_items(items, images=None),
            im_token_id=self.token_ids[Modality.IMAGE],
            video_token_id=self.token_ids[Modality.VIDEO],
        )


def _image_kinds(modalities: Any, images: int) -> list[str]:
    """What the request says of each image: SGLang says it once an image in a chat, and once for all
    or not at all on ``/generate``."""
    given = [modalities] if isinstance(modalities, str) else list(modalities or ())
    if len(given) != images:
        given = (given[:1] or [None]) * images
    return [kind or "image" for kind in given]


def _tower_dtype(hf_config: Any) -> torch.dtype:
    """In which pixels travel: bfloat16, half the bytes, where the tower rounds to it anyway."""
    wanted = str(get_model().dtype)
    if wanted == "auto":
        wanted = str(getattr(hf_config, "dtype", None))
    return torch.bfloat16 if wanted.endswith("bfloat16") else torch.float32
