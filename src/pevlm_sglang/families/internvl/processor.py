"""InternVL3.5's processor: the frames that the model was trained on, as many as asked for.

SGLang samples 32 frames of every video and mixes up placeholders where a video precedes an image;
see ``tiles.py`` for how else it differs from the reference.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.internvl import InternVLProcessor
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from pevlm_sglang.families.internvl.sizes import settings_of
from pevlm_sglang.families.internvl.tiles import Preparation
from pevlm_sglang.families.spans import leave_labels
from pevlm_sglang.families.tile_layout import tile_layout
from pevlm_sglang.media.sources import SafeSources
from pevlm_sglang.media.tower_dtype import tower_dtype
from pevlm_sglang.media.video_file import decoding, frame_bytes
from pevlm_sglang.media.wishes import Wishes, split

logger = logging.getLogger(__name__)

# SGLang's own names for what is yet to be written out.
_IMAGE, _VIDEO = "<<<__IMG_PLACEHOLDER__>>>", "<<<__VID_PLACEHOLDER__>>>"


@dataclass(frozen=True)
class _Video:
    """A sampled video.

    Attributes:
        tiles: ``[tiles of all frames, 3, size, size]``
        tiles_per_frame: tiles of each frame.
    """

    tiles: torch.Tensor
    tiles_per_frame: tuple[int, ...]


class PevlmInternVLProcessor(SafeSources, InternVLProcessor):
    """In place of SGLang's on a server with PEVLM.

    Raises:
        ValueError: a bad ``--mm-process-config``, or, of a request, bad wishes or media.
    """

    video_preprocessing_device = "cpu"  # decode there, as the reference does

    def __init__(self, hf_config: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, *args, **kwargs)
        self._settings = settings_of(self.video_config)
        self._size = int(hf_config.force_image_size or hf_config.vision_config.image_size)
        self._preparation = Preparation(self._size, tower_dtype(hf_config))

    @staticmethod
    def check_launch(hf_config: Any, video_config: Mapping[str, Any]) -> None:
        """Refuse bad video settings of a server.

        Raises:
            ValueError: an unknown name, or a bad value.
        """
        settings_of(video_config)

    async def process_qwen_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        """Text with ``<image>`` and ``<video>`` → tokens and tiles.

        Raises:
            ValueError: HTTP 400.
        """
        videos, wishes = split(getattr(request_obj, "video_data", None))
        for wish in wishes:
            wish.check({"max_frames": self._settings.max_frames})
        media = await self.load_mm_data(
            prompt=self._with_placeholders(input_text or "", image_data or (), videos),
            image_data=image_data,
            video_data=videos,
            multimodal_tokens=self.mm_tokens,
            discard_alpha_channel=True,
        )
        images = await asyncio.to_thread(self._images, media.images, request_obj)
        counts = self._counts(media, wishes, images, request_obj)
        sampled = [
            await asyncio.to_thread(self._sample, video, count, self._most(request_obj, "video"))
            for video, count in zip(media.videos, counts, strict=True)
        ]
        text = self._expanded(media.input_text, images, sampled)
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"].flatten()
        return MultimodalProcessorOutput(
            input_ids=ids.tolist(),
            mm_items=self._image_items(ids, images) + self._video_items(ids, sampled),
            im_start_id=self.img_start_token_id,
            im_end_id=self.img_end_token_id,
            im_token_id=self.img_context_token_id,
            video_token_id=self.video_token_id,
        )

    # --- Media ------------------------------------------------------------------------------

    def _most(self, request_obj: Any, kind: str) -> int:
        """Tiles of a picture at most: the request's, or one a frame and twelve an image."""
        default = self.IMAGE_MAX_NUM if kind == "image" else self.VIDEO_MAX_NUM
        given = getattr(request_obj, f"{kind}_max_dynamic_patch", None)
        return max(1, int(given or getattr(request_obj, "max_dynamic_patch", None) or default))

    def _images(self, images: Sequence[Image.Image], request_obj: Any) -> list[torch.Tensor]:
        """The tiles of each image."""
        most = self._most(request_obj, "image")
        return [self._preparation.tiles(image.convert("RGB"), most) for image in images]

    def _sample(self, video: VideoDecoderWrapper, count: int, most: int) -> _Video:
        """``count`` frames of a video; runs in a thread, because decoding takes its time."""
        with decoding():
            frames = [
                self._preparation.tiles(_picture(video[index]), most)
                for index in self._preparation.indices(len(video), count)
            ]
        return _Video(torch.cat(frames), tuple(len(tiles) for tiles in frames))

    def _counts(
        self, media: Any, wishes: Sequence[Wishes], images: Sequence[torch.Tensor], request: Any
    ) -> list[int]:
        """Frames of each video: what was asked for, or a default that the context holds.

        Raises:
            ValueError: a wish that the context does not hold.
        """
        if not media.videos:
            return []
        for video in media.videos:
            if not isinstance(video, VideoDecoderWrapper) or not len(video):
                raise ValueError("video: expected a file with at least one frame, got none")
        tiles = max(self._tiles_a_frame(video, request) for video in media.videos)
        wrapping = self._preparation.label(self._settings.num_frames)
        wrapping += self.IMG_START + self.IMG_END + "\n"
        frame = tiles * self.num_image_token + self._token_len(wrapping)
        taken = self._token_len(media.input_text) + self.CONTEXT_RESERVED
        taken += sum(map(len, images)) * self.num_image_token
        most = max(0, int(self.max_context_len) - taken) // frame
        default = self._settings.num_frames
        counts = share([wish.max_frames for wish in wishes], default, most)
        if min(counts) < default and any(wish.max_frames is None for wish in wishes):
            logger.warning(
                "PEVLM: %s frames of %d videos in place of %d each: the context of %d tokens "
                "holds %d",
                counts,
                len(counts),
                default,
                self.max_context_len,
                most,
            )
        return counts

    def _tiles_a_frame(self, video: VideoDecoderWrapper, request_obj: Any) -> int:
        frame_bytes(video)
        height, width = video.frame_shape
        columns, rows = tile_layout(width, height, self._size, self._most(request_obj, "video"))
        return columns * rows + (columns * rows > 1)

    # --- The prompt -------------------------------------------------------------------------

    def _with_placeholders(self, prompt: str, images: Sequence[Any], videos: Sequence[Any]) -> str:
        """The prompt, with a placeholder for each image and video."""
        # The chat template writes <IMG_CONTEXT>. SGLang would add <image> to it, and leave a
        # placeholder of its own behind in the text.
        prompt = prompt.replace(self.IMG_CONTEXT, self.IMAGE_PLACEHOLDER_TOKEN)
        for placeholder, media in (
            (self.IMAGE_PLACEHOLDER_TOKEN, images),
            (self.VIDEO_PLACEHOLDER_TOKEN, videos),
        ):
            if media:
                prompt = self._ensure_placeholders_before_assistant(prompt, placeholder, len(media))
        return prompt

    def _expanded(self, text: str, images: Sequence[torch.Tensor], videos: Sequence[_Video]) -> str:
        """The text with each placeholder written out, as it is tokenized."""
        for placeholder in (self.IMAGE_PLACEHOLDER_TOKEN, self.IMG_CONTEXT):
            text = text.replace(placeholder, _IMAGE)
        text = text.replace(self.VIDEO_PLACEHOLDER_TOKEN, _VIDEO)
        for tiles in images:
            text = text.replace(_IMAGE, self._wrapped(self.IMG_CONTEXT, len(tiles)), 1)
        for video in videos:
            frames = (
                self._preparation.label(number) + self._wrapped(self.VIDEO_CONTEXT_TOKEN, tiles)
                for number, tiles in enumerate(video.tiles_per_frame, 1)
            )
            text = text.replace(_VIDEO, "\n".join(frames) + "\n", 1)
        return text

    def _wrapped(self, token: str, tiles: int) -> str:
        return self.IMG_START + token * (self.num_image_token * tiles) + self.IMG_END

    # --- Items ------------------------------------------------------------------------------

    def _image_items(
        self, ids: torch.Tensor, images: Sequence[torch.Tensor]
    ) -> list[MultimodalDataItem]:
        """An item an image, so that each is known to the prefix cache by itself."""
        offsets = self._offsets(ids, self.IMG_CONTEXT, self.img_context_token_id, len(images))
        return [
            MultimodalDataItem(feature=tiles, modality=Modality.IMAGE, offsets=[offset])
            for tiles, offset in zip(images, offsets, strict=True)
        ]

    def _video_items(self, ids: torch.Tensor, videos: Sequence[_Video]) -> list[MultimodalDataItem]:
        """An item a video."""
        frames = [len(video.tiles_per_frame) for video in videos]
        offsets = self._offsets(ids, self.VIDEO_CONTEXT_TOKEN, self.video_token_id, sum(frames))
        label, at = self._preparation.label(1), 0
        items: list[MultimodalDataItem] = []
        for video, count in zip(videos, frames, strict=True):
            item = MultimodalDataItem(
                feature=video.tiles, modality=Modality.VIDEO, offsets=offsets[at : at + count]
            )
            before = ids[: offsets[at][0] - 1].tolist()
            leave_labels(item, [(count, opening_tokens(self.tokenizer, before, label))])
            items.append(item)
            at += count
        return items

    def _offsets(
        self, ids: torch.Tensor, token: str, token_id: int, expected: int
    ) -> list[tuple[int, int]]:
        """Where the runs of a placeholder lie; SGLang's offsets are inclusive at the end."""
        offsets: list[tuple[int, int]] = self.get_mm_items_offset(ids, token_id)
        if len(offsets) != expected:
            raise ValueError(
                f"prompt: expected {token} only where an image or a video stands ({expected}), "
                f"got {len(offsets)}; leave it out of the text"
            )
        return offsets


def opening_tokens(tokenizer: Any, before: Sequence[int], label: str) -> int:
    """How many tokens at the end of ``before`` hold nothing but ``label``, with which it ends.

    A token in which other text runs on into the label is not among them.
    """
    for count in range(1, len(before) + 1):
        text = tokenizer.decode(before[-count:], clean_up_tokenization_spaces=False)
        if text.endswith(label):
            return count if text == label else count - 1
    raise ValueError(f"prompt: expected {label!r} before the first frame of a video, got none")


def _picture(frame: Any) -> Image.Image:
    """A decoded frame, ``[height, width, 3]`` uint8; a tensor where SGLang decodes on the GPU."""
    return Image.fromarray(frame.cpu().numpy() if isinstance(frame, torch.Tensor) else frame)


def share(wishes: Sequence[int | None], default: int, most: int) -> list[int]:
    """How many frames each video of a prompt gets.

    Args:
        wishes: of the request, a number a video; None = the default.
        default: of the server. It shrinks, alike for all videos that take it, where the context
            does not hold as much; a wish does not.
        most: frames that the context holds.

    Raises:
        ValueError: the context does not hold the wishes, and a frame of every other video.
    """
    asked = sum(wish for wish in wishes if wish is not None)
    others = sum(wish is None for wish in wishes)
    if asked + others > max(most, len(wishes)):
        raise ValueError(
            f"max_frames: expected at most {most} frames in all, what the context holds beside "
            f"the text, got {asked} for {len(wishes) - others} of {len(wishes)} videos"
        )
    shared = min(default, max(1, (most - asked) // others)) if others else default
    return [shared if wish is None else wish for wish in wishes]
