"""InternVL3.5: Hugging Face's model, fed by the code of the published model card.

Sampling, tiles and the prompt follow the card's ``load_video``, ``load_image`` and ``chat``.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.families.internvl_model import CONTEXT, SIZE, TOKENS
from support.oracle import Oracle
from support.spec_mask import Steps

IMAGE, VIDEO = "<image>", "<video>"


class InternVLOracle(Oracle):
    """Args:
    model: directory of the checkpoint.
    num_frames: sampled of each video.
    """

    def __init__(self, model: Path, *, num_frames: int = 32) -> None:
        from transformers import AutoTokenizer, InternVLForConditionalGeneration

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = InternVLForConditionalGeneration.from_pretrained(
            model / "reference", dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.num_frames = num_frames

    def inputs(
        self,
        prompt: str,
        videos: Sequence[Path],
        images: Sequence[Any] = (),
        *,
        num_frames: Sequence[int] | None = None,
        max_tiles: int = 1,
    ) -> dict[str, Any]:
        """See :class:`Oracle`.

        Args:
            num_frames: of each video, in place of the default.
            max_tiles: of a frame.

        Returns:
            ``input_ids`` ``[1, length]``, ``tiles`` ``[n, 3, 448, 448]`` in prompt order, the
            token ranges of the frames of each video (``videos``) and of each image (``images``).
        """
        counts = num_frames or [self.num_frames] * len(videos)
        clips = [
            [load(frame, max_tiles) for frame in sample(video, count)]
            for video, count in zip(videos, counts, strict=True)
        ]
        pictures = [load(image, max_tiles=12) for image in images]
        prompt_tiles = [*map(len, pictures)], [[*map(len, clip)] for clip in clips]
        queues = {IMAGE: iter([[picture] for picture in pictures]), VIDEO: iter(clips)}
        tiles = [t for name in re.findall(f"{IMAGE}|{VIDEO}", prompt) for t in next(queues[name])]
        return {
            **written(self.tokenizer, prompt, *prompt_tiles),
            "tiles": torch.cat(tiles) if tiles else None,
        }

    def videos(self, inputs: Any) -> list[Steps]:
        return [*inputs["videos"]]

    def images(self, inputs: Any) -> list[tuple[int, int]]:
        return [*inputs["images"]]

    def logits(self, inputs: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()(ids)
        if inputs["tiles"] is not None:
            placeholders = ids == self.tokenizer.convert_tokens_to_ids(CONTEXT)
            features = self.features(inputs["tiles"]).flatten(0, 1)
            assert int(placeholders.sum()) == len(features)
            embeddings[placeholders] = features
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings[None], attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden)[0]
        return logits

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """``[n, 3, 448, 448]`` → ``[n, 16, hidden]``, of the vision tower and the projector."""
        features: torch.Tensor = self.model.model.get_image_features(
            tiles, vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output
        return features


def written(
    tokenizer: Any, prompt: str, images: Sequence[int], videos: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """A prompt as the reference writes it out, and where its media lie.

    Args:
        tokenizer: of the model.
        prompt: with one placeholder an image or video.
        images: tiles of each image.
        videos: tiles of each frame of each video.

    Returns:
        ``input_ids`` ``[1, length]``; ``videos``, the steps of each, which start and end with the
        first token that starts in them and after them; ``images``, the placeholders of each.
    """
    image_tiles, frame_tiles = iter(images), iter(videos)
    text = ""
    cuts: dict[str, list[list[int]]] = {IMAGE: [], VIDEO: []}  # in characters
    for part in re.split(f"({IMAGE}|{VIDEO})", prompt):
        if part == IMAGE:
            start = len(text) + len("<img>")
            text += f"<img>{CONTEXT * (TOKENS * next(image_tiles))}</img>"
            cuts[part].append([start, len(text) - len("</img>")])
        elif part == VIDEO:
            starts = []
            for number, tiles in enumerate(next(frame_tiles), 1):
                starts.append(len(text))
                text += f"Frame{number}: <img>{CONTEXT * (TOKENS * tiles)}</img>\n"
            cuts[part].append([*starts, len(text)])
        else:
            text += part
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    # A token of a byte-level vocabulary is spelt with a character a byte.
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
    token_starts = [0, *accumulate(lengths)]
    assert token_starts[-1] == len(text.encode())

    def tokens(characters: Sequence[int]) -> list[tuple[int, int]]:
        """The ranges between the first tokens that start at or after some characters."""
        at = [bisect_left(token_starts, len(text[:c].encode())) for c in characters]
        return list(pairwise(at))

    return {
        "input_ids": ids,
        "videos": [tokens(starts) for starts in cuts[VIDEO]],
        "images": [tokens(ends)[0] for ends in cuts[IMAGE]],
    }


def sample(video: Path, count: int) -> list[Any]:
    """The middle frame of each of ``count`` equal segments, as pictures."""
    from PIL import Image
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(video), dimension_order="NHWC")
    segment = float(len(decoder) - 1) / count
    indices = [int(segment / 2 + np.round(segment * i)) for i in range(count)]
    return [Image.fromarray(decoder.get_frame_at(i).data.numpy()) for i in indices]


def load(picture: Any, max_tiles: int) -> torch.Tensor:
    """``[tiles, 3, 448, 448]``: the grid whose ratio is closest, and the whole as a thumbnail."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.Resize((SIZE, SIZE), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    columns, rows = tile_grid(picture.width, picture.height, max_tiles)
    whole = picture.resize((columns * SIZE, rows * SIZE))
    tiles = []
    for i in range(columns * rows):
        x, y = i % columns * SIZE, i // columns * SIZE
        tiles.append(transform(whole.crop((x, y, x + SIZE, y + SIZE))))
    if len(tiles) > 1:
        tiles.append(transform(picture))
    return torch.stack(tiles)


def tile_grid(width: int, height: int, most: int) -> tuple[int, int]:
    """Columns and rows: small grids first, a later one only if closer, or as close and the picture
    has more than half of its pixels."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    best = grids[0]
    for grid in grids[1:]:
        gap = abs(width / height - grid[0] / grid[1]) - abs(width / height - best[0] / best[1])
        if gap < 0 or (gap == 0 and width * height > SIZE * SIZE * grid[0] * grid[1] / 2):
            best = grid
    return best
