"""LLaVA-Video: a video as the reference samples, preprocesses and lays it out.

SGLang's processor for these models takes no ``video_url``, and rounds pixels to float16. This one
takes videos, images and lists of frames, expands their placeholders and says where they lie, so
that they go the way of SGLang's other multimodal models from there.

A placeholder is ``<image>`` or ``<video>``, as the chat template chatml-llava writes them; in a
prompt with videos alone, ``<image>`` is one too, as in the reference. The text between them is
tokenized piece by piece, as the reference does, so that the checkpoint's tokenizer need not know
them.
Source: LLaVA-NeXT, docs/LLaVA_Video_1003.md and ``tokenizer_image_token`` in llava/mm_utils.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.mm_utils import ensure_numpy, expand2square, process_anyres_image
from sglang.srt.multimodal.processors.llava import LlavaImageProcessor
from sglang.srt.utils import load_image, load_video

from pevlm_sglang.families.frame_counts import FrameSettings
from pevlm_sglang.families.llava_video.image_tokens import image_tokens, patches_per_side
from pevlm_sglang.families.llava_video.sizes import DEFAULT_NUM_FRAMES, TokenLayout, sampled_frames
from pevlm_sglang.families.llava_video.spans import FRAMES
from pevlm_sglang.media.sources import check_path, reading
from pevlm_sglang.media.video_file import decoding, frames_of, length_and_rate
from pevlm_sglang.media.wishes import Wishes, split

IMAGE, VIDEO = "<image>", "<video>"
_PLACEHOLDER = re.compile(f"{IMAGE}|{VIDEO}")


@dataclass(frozen=True)
class _Medium:
    """A video, an image or a frame of a list, preprocessed.

    Attributes:
        modality: IMAGE or VIDEO.
        pixels: ``[frames or tiles, 3, height, width]``.
        tokens: how many it becomes.
        data: what the model has to know beside the pixels.
        identity: by which SGLang's caches know it. The same pixels have other features as a frame
            and as a picture, so it is more than a hash of the pixels.
    """

    modality: Modality
    pixels: torch.Tensor
    tokens: int
    data: dict[str, Any]
    identity: int

    @classmethod
    def of(
        cls, modality: Modality, pixels: torch.Tensor, tokens: int, data: dict[str, Any]
    ) -> _Medium:
        pixels = pixels.contiguous()
        digest = hashlib.sha256(pixels.view(torch.uint8).numpy().data)
        digest.update(repr((modality.name, data)).encode())
        return cls(modality, pixels, tokens, data, int.from_bytes(digest.digest()[:8], "big"))


class LlavaVideoProcessor(LlavaImageProcessor):
    """See the module."""

    @staticmethod
    def check_launch(hf_config: Any, video_config: Mapping[str, Any]) -> None:
        """Refuse a server's video settings.

        Raises:
            ValueError: see :meth:`FrameSettings.of`.
        """
        FrameSettings.of(video_config, default=DEFAULT_NUM_FRAMES)

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self._settings = FrameSettings.of(self.video_config, default=DEFAULT_NUM_FRAMES)
        self._patches = patches_per_side(hf_config)
        self._layout = TokenLayout.of(hf_config, self._patches)
        name = server_args.dtype
        self._dtype = hf_config.dtype if name == "auto" else getattr(torch, name)

    async def process_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, *args: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        """Expand a request's placeholders, and preprocess what they stand for.

        Raises:
            ValueError: a medium that cannot be read, a wish that cannot be met, or placeholders
                that do not fit the media.
        """
        videos, wishes = split(request_obj.video_data)
        images = list(image_data or ())
        if any(isinstance(medium, dict) for medium in (*images, *videos)):
            raise ValueError(
                "image_data, video_data: expected files, URLs or bytes, got a dict; features that "
                "are processed already are not taken"
            )
        for wish in wishes:
            wish.check(self._settings.limits())
        pieces, order = self._pieces(input_text, len(images), len(videos))
        media = await self._load(images, videos, wishes, request_obj.modalities)
        return self._expand(pieces, [media[kind].pop(0) for kind in order])

    # --- The prompt ---------------------------------------------------------------------------

    def _pieces(
        self, prompt: str | Sequence[int], images: int, videos: int
    ) -> tuple[list[list[int]], list[str]]:
        """The tokens around the placeholders, one piece more than those, and their kinds."""
        if isinstance(prompt, str):
            kinds = _PLACEHOLDER.findall(prompt)
            texts = _PLACEHOLDER.split(prompt)
            pieces = [self._tokenizer(text).input_ids if text else [] for text in texts]
        else:
            token = self.hf_config.image_token_index
            pieces = [[]]
            for token_id in prompt:
                if token_id == token:
                    pieces.append([])
                else:
                    pieces[-1].append(token_id)
            kinds = [VIDEO if videos and not images else IMAGE] * (len(pieces) - 1)
        if videos and not images and VIDEO not in kinds:
            kinds = [VIDEO] * len(kinds)
        for kind, expected in ((IMAGE, images), (VIDEO, videos)):
            if kinds.count(kind) != expected:
                raise ValueError(
                    f"prompt: expected one {kind} a{'n' if kind == IMAGE else ''} {kind[1:-1]} "
                    f"({expected}), got {kinds.count(kind)}"
                )
        return pieces, kinds

    def _expand(
        self, pieces: Sequence[Sequence[int]], media: Sequence[_Medium]
    ) -> MultimodalProcessorOutput:
        token = self.hf_config.image_token_index
        ids = list(pieces[0])
        items = []
        for medium, piece in zip(media, pieces[1:], strict=True):
            span = (len(ids), len(ids) + medium.tokens - 1)  # SGLang's are inclusive at the end
            ids += [token] * medium.tokens
            ids += piece
            items.append(
                MultimodalDataItem(
                    modality=medium.modality,
                    hash=medium.identity,
                    feature=medium.pixels,
                    offsets=[span],
                    model_specific_data=medium.data,
                )
            )
        return MultimodalProcessorOutput(
            mm_items=items, input_ids=ids, im_token_id=token, video_token_id=token
        )

    # --- Media --------------------------------------------------------------------------------

    async def _load(
        self, images: list[Any], videos: list[Any], wishes: list[Wishes], modalities: Any
    ) -> dict[str, list[_Medium]]:
        loop = asyncio.get_running_loop()

        def start(work: Any, *args: Any) -> Any:
            return loop.run_in_executor(self.io_executor, work, *args)

        kinds = _image_kinds(modalities, len(images))
        tiled = kinds == ["image"] and not videos  # anyres is for a picture on its own
        pictures = [start(self._image, *image, tiled) for image in zip(images, kinds, strict=True)]
        clips = [start(self._video, *video) for video in zip(videos, wishes, strict=True)]
        media = await asyncio.gather(*pictures, *clips)
        return {IMAGE: media[: len(images)], VIDEO: media[len(images) :]}

    def _video(self, video: Any, wish: Wishes) -> _Medium:
        with decoding():
            decoder = load_video(video, use_gpu=False)
        indices = sampled_frames(
            *length_and_rate(decoder),
            wish.max_frames or self._settings.num_frames,
            wish.fps or self._settings.fps,
        )
        distinct = sorted(set(indices))
        pixels = {
            i: self._preprocess(Image.fromarray(frame))
            for i, frame in zip(distinct, frames_of(decoder, distinct), strict=True)
        }
        return _Medium.of(
            Modality.VIDEO,
            torch.stack([pixels[i] for i in indices]),
            self._layout.tokens(len(indices)),
            {FRAMES: len(indices)},
        )

    def _image(self, source: Any, kind: str, tiled: bool) -> _Medium:
        with reading():
            check_path(source)
            image = load_image(source, False)[0].convert("RGB")
        if kind == "video":  # a frame: the reference resizes it, and does not pad it
            pixels = self._preprocess(image)[None]
            return _Medium.of(Modality.VIDEO, pixels, self._layout.tokens(1), {})
        aspect = getattr(self.hf_config, "image_aspect_ratio", None) or "square"
        processor = self._processor.image_processor
        if tiled and "anyres" in aspect:
            grid = self.hf_config.image_grid_pinpoints
            tiles = process_anyres_image(image, processor, grid)
            pixels = torch.from_numpy(tiles).to(self._dtype)
        else:
            if aspect == "pad" or not tiled:
                image = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
            pixels = self._preprocess(image)[None]
        tokens = image_tokens(self.hf_config, self._patches, len(pixels), image.size)
        return _Medium.of(Modality.IMAGE, pixels, tokens, {"image_size": list(image.size)})

    def _preprocess(self, image: Image.Image) -> torch.Tensor:
        """``[3, height, width]`` in the server's numeric type."""
        pixels = ensure_numpy(self._processor.image_processor(image)["pixel_values"][0])
        return torch.from_numpy(np.ascontiguousarray(pixels)).to(self._dtype)


def _image_kinds(modalities: Any, images: int) -> list[str]:
    """What each image is: ``image``, ``multi-images`` or ``video`` (a frame of one).

    SGLang says it once an image in a chat, and once for all or not at all on ``/generate``.
    """
    given = [modalities] if isinstance(modalities, str) else list(modalities or ())
    if len(given) != images:
        given = (given[:1] or [None]) * images
    return [kind or "image" for kind in given]
