"""LLaVA-Video's model: SGLang's, with the vision path of the reference.

SGLang 0.5.23 (sglang/srt/models/llava.py) computes something else than the reference in LLaVA-NeXT:

- a frame gets one newline token where the reference has one after each pooled row, and there is
  no room for it in the prompt: it overwrites the token that follows the video;
- up to 16 frames, a frame has room for 729 tokens and only 197 features; the rest keep the
  embedding of a meaningless token, and a chunk that is cut there ends the scheduler;
- the vision tower and the newline are rounded to float16, whatever the server's numeric type.

Here the features of videos and images are those of the reference, and they go through SGLang's
common multimodal path: an embedding cache, chunks cut anywhere, offsets from the processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.managers.mm_utils import (
    MultiModalityDataPaddingPatternMultimodalTokens,
    general_mm_embed_routine,
)
from sglang.srt.models import llava as upstream
from torch.nn import functional

from pevlm_sglang.families.llava_video.image_layout import lay_out_image
from pevlm_sglang.families.llava_video.sizes import POOL_STRIDE, TokenLayout
from pevlm_sglang.families.llava_video.spans import ENDS

FRAMES_A_RUN = 16
"""Frames that the vision tower takes at once: it keeps every layer's output, 100 MB a layer of the
published model at this number."""


class LlavaQwenForCausalLM(upstream.LlavaQwenForCausalLM):
    """See the module. SGLang knows an architecture by the name of its class."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the checkpoint, its vision tower and newline in the server's numeric type."""

        def once_the_tower_is_made() -> Iterator[tuple[str, torch.Tensor]]:
            # In float16, before SGLang asks for the first weight.
            dtype = self.language_model.model.embed_tokens.weight.dtype
            self.vision_tower.to(dtype)
            newline = self.language_model.model.image_newline
            newline.data = newline.data.to(dtype)
            yield from weights

        super().load_weights(once_the_tower_is_made())

    def pad_input_ids(self, input_ids: Any, mm_inputs: Any) -> Any:
        """The processor has expanded the placeholders; give each item's its pad values."""
        pattern = MultiModalityDataPaddingPatternMultimodalTokens()
        return pattern.pad_input_tokens(input_ids, mm_inputs)

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            multimodal_model=self,
            positions=positions,
        )

    def get_video_feature(self, items: list[Any]) -> torch.Tensor:
        """``[tokens, hidden]`` of videos and of the frames of lists, one after the other."""
        newline = self.language_model.model.image_newline
        layout = TokenLayout.of(self.config, self.num_patches_per_side)
        return torch.cat(
            [
                lay_out(
                    self._encode(item),
                    layout,
                    newline,
                    ends=item.model_specific_data.get(ENDS, True),
                )
                for item in items
            ]
        )

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        """``[tokens, hidden]`` of images, one after the other."""
        newline = self.language_model.model.image_newline
        return torch.cat(
            [
                lay_out_image(
                    self._encode(item), newline, self.config, item.model_specific_data["image_size"]
                )
                for item in items
            ]
        )

    def _encode(self, item: Any) -> torch.Tensor:
        """``[frames or tiles, patches, hidden]``, projected."""
        weight = self.language_model.model.embed_tokens.weight
        pixels = torch.as_tensor(item.feature)
        runs = [
            self.encode_images(run.to(weight.device, weight.dtype))
            for run in pixels.split(FRAMES_A_RUN)
        ]
        return torch.cat(runs)


def lay_out(
    features: torch.Tensor, layout: TokenLayout, newline: torch.Tensor, *, ends: bool = True
) -> torch.Tensor:
    """Pool the features of a clip, and put newlines where the reference has them.

    Args:
        features: ``[frames, patches, hidden]``.
        layout: of the model.
        newline: ``[hidden]``.
        ends: whether its video ends with it.

    Returns:
        ``[tokens, hidden]``, for a whole video ``layout.tokens(frames)`` of them.

    Source: ``get_2dPool``, ``add_token_per_grid`` and ``add_token_per_frame`` of LLaVA-NeXT.
    """
    frames = len(features)
    grid = features.unflatten(1, (layout.patches, layout.patches)).permute(0, 3, 1, 2)
    side = layout.side
    if layout.pool_mode == "bilinear":
        pooled = functional.interpolate(grid, size=(side, side), mode="bilinear")
    elif layout.pool_mode == "average":
        pooled = functional.avg_pool2d(grid, POOL_STRIDE)
    else:
        pooled = functional.max_pool2d(grid, POOL_STRIDE)
    rows = pooled.permute(0, 2, 3, 1)
    if layout.newline == "grid":
        rows = torch.cat([rows, newline.expand(frames, side, 1, -1)], dim=2)
    tokens = rows.flatten(1, 2)
    if layout.newline == "frame":
        tokens = torch.cat([tokens, newline.expand(frames, 1, -1)], dim=1)
    tokens = tokens.flatten(0, 1)
    if layout.newline == "one_token" and ends:
        tokens = torch.cat([tokens, newline[None]])
    return tokens
