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

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.mm_utils import ensure_numpy, expand2square, process_anyres_image
from sglang.srt.multimodal.processors.llava import LlavaImageProcessor

from pevlm_sglang.families.llava_video.image_layout import lay_out_image, patches_per_side
from pevlm_sglang.families.llava_video.sizes import LlavaGeometry, TokenLayout
from pevlm_sglang.families.llava_video.spans import ENDS, FRAMES
from pevlm_sglang.families.placeholder_processor import Medium, PlaceholderProcessor
from pevlm_sglang.media.clips import whole


class LlavaVideoProcessor(PlaceholderProcessor, LlavaImageProcessor):
    """See the module."""

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        token = hf_config.image_token_index
        self.token_ids = {Modality.VIDEO: token, Modality.IMAGE: token}
        self._patches = patches_per_side(hf_config)
        self._layout = TokenLayout.of(hf_config, self._patches)

    @staticmethod
    def geometry_of(hf_config: Any) -> LlavaGeometry:
        return LlavaGeometry()  # for its sampling alone

    def tokenize(
        self, prompt: str | Sequence[int], images: int, videos: int
    ) -> tuple[list[list[int]], list[Modality]]:
        if isinstance(prompt, str):
            known = {text: kind for kind, text in self.placeholders.items()}
            parts = re.split(f"({'|'.join(known)})", prompt)
            pieces = [self._tokenizer(text).input_ids if text else [] for text in parts[::2]]
            kinds = [known[text] for text in parts[1::2]]
        else:
            pieces, kinds = super().tokenize(prompt, images, videos)
        if videos and not images and Modality.VIDEO not in kinds:
            kinds = [Modality.VIDEO] * len(kinds)
        return pieces, kinds

    def video_tokens(self, frames: int) -> int:
        return self._layout.tokens(frames)

    async def video(self, video: Any, indices: Sequence[int]) -> Medium:
        clips = await self.sampled(video, indices, self._pixels)
        data = {FRAMES: len(indices)}
        return Medium(Modality.VIDEO, clips, self._layout.tokens(len(indices)), data=data)

    def cut(
        self, medium: Medium, offsets: Sequence[tuple[int, int]], start: int, end: int
    ) -> tuple[Mapping[str, Any], Sequence[tuple[int, int]]]:
        """See the base. A video has one run of placeholders, and perhaps a newline behind it."""
        if FRAMES not in medium.data:
            return medium.data, offsets
        ends = end == medium.data[FRAMES]
        ((first, last),) = offsets
        own = first + start * self._layout.tokens_per_frame
        beyond = last + 1 if ends else first + end * self._layout.tokens_per_frame
        return {FRAMES: end - start, ENDS: ends}, [(own, beyond - 1)]

    def image(self, image: Image.Image, kind: str, *, alone: bool) -> Medium:
        if kind == "video":  # a frame: the reference resizes it, and does not pad it
            frame = whole(self._pixels(image)[None])
            return Medium(Modality.VIDEO, (frame,), self._layout.tokens(1))
        tiled = alone and kind == "image"  # anyres is for a picture on its own
        aspect = getattr(self.hf_config, "image_aspect_ratio", None) or "square"
        processor = self._processor.image_processor
        if tiled and "anyres" in aspect:
            tiles = process_anyres_image(image, processor, self.hf_config.image_grid_pinpoints)
            pixels = torch.from_numpy(tiles).to(self._dtype)
        else:
            if aspect == "pad" or not tiled:
                image = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
            pixels = self._pixels(image)[None]
        # The launcher has no features yet, and needs but their number.
        features = torch.empty(len(pixels), self._patches**2, 1, device="meta")
        tokens = len(lay_out_image(features, features[0, 0], self.hf_config, image.size))
        data = {"image_size": list(image.size)}
        return Medium(Modality.IMAGE, (whole(pixels),), tokens, data=data)

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        """``[3, height, width]`` in the numeric type that travels."""
        pixels = ensure_numpy(self._processor.image_processor(image)["pixel_values"][0])
        return torch.from_numpy(np.ascontiguousarray(pixels)).to(self._dtype)
