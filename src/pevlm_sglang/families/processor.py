"""What the processors of families have in common: the launch check, wishes, sampled frames; and a
whole processor for families whose prompt is tokens between placeholders."""

from __future__ import annotations

import asyncio
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.runtime_context import get_model

from pevlm_sglang.media.sources import SafeSources
from pevlm_sglang.media.video_file import frames_of, length_and_rate
from pevlm_sglang.media.wishes import Wishes, split


class VideoProcessor(SafeSources, BaseMultimodalProcessor):
    """Before SGLang's processor of the family in its class's bases.

    Attributes:
        geometry: of the model.
        settings: of the server.

    Raises:
        ValueError: a bad ``--mm-process-config``.
    """

    models: list[type] = []  # noqa: RUF012 (found by architecture, see families/registry.py)

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        self.geometry = self.geometry_of(hf_config)
        self.settings = self.geometry.settings(self.settings_of(self.video_config))
        self._dtype = _tower_dtype(hf_config)

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
        sources, wishes = split(video_data)
        for wish in wishes:
            wish.check(self.geometry.limits(self.settings))
        return sources, wishes

    def sampled(
        self, video: Any, settings: Any, pixels: Callable[[Image.Image], torch.Tensor]
    ) -> list[torch.Tensor]:
        """What ``pixels`` makes of each sampled frame of a video; of one that repeats, once.

        Args:
            video: SGLang's ``VideoDecoderWrapper``.
            settings: for this video.

        Raises:
            ValueError: a file that cannot be decoded.
        """
        indices = self.geometry.indices(*length_and_rate(video), settings)
        distinct = sorted(set(indices))
        frames = map(Image.fromarray, frames_of(video, distinct))
        made = dict(zip(distinct, map(pixels, frames), strict=True))
        return [made[index] for index in indices]


@dataclass(frozen=True)
class Medium:
    """A video, an image or a frame of a list, preprocessed.

    Attributes:
        pixels: ``[frames or tiles, 3, height, width]``.
        runs: of placeholders, each of ``tokens``.
        before, after: tokens of the text around each run.
        data: what the spans and the model have to know beside the pixels.
        identity: by which SGLang's caches know it. The same pixels may have other features as a
            frame and as a picture, so it is more than a hash of the pixels.
    """

    modality: Modality
    pixels: torch.Tensor
    tokens: int
    runs: int = 1
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    identity: int = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.pixels.contiguous().view(torch.uint8).numpy().data)
        digest.update(repr((self.modality.name, self.data)).encode())
        object.__setattr__(self, "identity", int.from_bytes(digest.digest()[:8], "big"))


class PlaceholderProcessor(VideoProcessor):
    """Tokens of a prompt between placeholders, each of which becomes what its medium needs.

    Attributes:
        placeholders: what stands for an image or video in a text.
        token_ids: of the expanded placeholders.
    """

    gpu_image_decode = False  # PIL images, and frames decoded on the CPU, as in the references
    video_preprocessing_device = "cpu"
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
    def video(self, video: Any, settings: Any) -> Medium:
        """A video; see :meth:`sampled`."""

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
        videos, wishes = self.wishes(request_obj.video_data)
        images = list(image_data or ())
        if any(isinstance(medium, dict) for medium in (*images, *videos)):
            raise ValueError(
                "image_data, video_data: expected a file, URL or bytes, got a dict; features that "
                "are processed already are not taken"
            )
        pieces, order = self.tokenize(input_text, len(images), len(videos))
        for kind, given in ((Modality.IMAGE, images), (Modality.VIDEO, videos)):
            if order.count(kind) != len(given):
                raise ValueError(
                    f"prompt: expected {len(given)} of {self.placeholders[kind]}, one for each "
                    f"{kind.name.lower()}, got {order.count(kind)}"
                )
        loaded = await self.fast_load_mm_data("", self.mm_tokens, images, videos)
        kinds = _image_kinds(getattr(request_obj, "modalities", None), len(images))
        alone = len(images) == 1 and not videos
        work: list[Callable[[], Medium]] = [
            partial(self.image, image, kind, alone=alone)
            for image, kind in zip(loaded.images, kinds, strict=True)
        ]
        for video, wish in zip(loaded.videos, wishes, strict=True):
            work.append(partial(self.video, video, self.settings.wished(wish)))
        loop = asyncio.get_running_loop()
        prepared = [loop.run_in_executor(self.io_executor, medium) for medium in work]
        media = await asyncio.gather(*prepared)
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
