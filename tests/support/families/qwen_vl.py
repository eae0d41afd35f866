"""Qwen2-VL and Qwen2.5-VL: Hugging Face's model, with M-RoPE positions from their definition, on
videos that qwen-vl-utils has read, sampled and resized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from support.exchange import Sampled
from support.oracle import Oracle
from support.spec_mask import Steps

SAMPLED_FPS = 2.0  # SGLang's default for Qwen's models; the clips here are longer than 4 frames
FEW_PIXELS = {"min_pixels": 3136}  # what the test servers are started with


class QwenVLOracle(Oracle):
    """Args:
    model: directory of the checkpoint.
    upstream_vision: whether to reproduce the places where SGLang's vision path differs
        from the reference: truncated frame numbers, 24 frames a second, and one attention
        segment for a whole video. (Clips whose sides are multiples of 28 pixels are not resized.)
    settings: video settings of the server.
    """

    def __init__(
        self,
        model: Path,
        *,
        upstream_vision: bool = False,
        settings: Mapping[str, Any] = FEW_PIXELS,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(model)
        self.model = AutoModelForImageTextToText.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.upstream_vision = upstream_vision
        self.settings = settings
        self.frames_per_step = self.model.config.vision_config.temporal_patch_size

    def inputs(
        self, prompt: str, videos: Sequence[Path | Sampled], images: Sequence[Any] = ()
    ) -> Any:
        """The processor's output for a prompt with one placeholder a video or image."""
        if self.upstream_vision:
            clips = [upstream_sample(_path(video)) for video in videos]
        else:
            patch = self.model.config.vision_config.patch_size
            clips = [
                reference_video(
                    _path(video),
                    {**self.settings, **getattr(video, "wishes", {})},
                    image_patch_size=patch,
                )
                for video in videos
            ]
        return reference_inputs(self.processor, prompt, clips, images)

    def videos(self, inputs: Any) -> list[Steps]:
        return self._steps(inputs, "video")

    def images(self, inputs: Any) -> list[tuple[int, int]]:
        return [step for (step,) in self._steps(inputs, "image")]

    def _steps(self, inputs: Any, kind: str) -> list[Steps]:
        """The steps of each video (or image), found as equal parts of its run of placeholders."""
        placeholder = getattr(self.model.config, f"{kind}_token_id")
        positions = (inputs["input_ids"][0] == placeholder).nonzero().flatten().tolist()
        merge = self.model.config.vision_config.spatial_merge_size**2
        items: list[Steps] = []
        at = 0
        for t, h, w in inputs.get(f"{kind}_grid_thw", torch.empty(0, 3, dtype=torch.long)).tolist():
            size = h * w // merge
            starts = [positions[at + i * size] for i in range(t)]
            items.append([(start, start + size) for start in starts])
            at += t * size
        assert at == len(positions), "every placeholder belongs to one step"
        return items

    def logits(self, inputs: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pixels = {
            name: inputs[name]
            for name in (
                "pixel_values",
                "pixel_values_videos",
                "image_grid_thw",
                "video_grid_thw",
            )
            if name in inputs
        }
        if self.upstream_vision and "video_grid_thw" in pixels:
            pixels["mm_encoder_outputs"] = {"video": self._upstream_features(pixels)}
            del pixels["pixel_values_videos"]
        out = self.model(
            input_ids=ids[None],
            position_ids=mrope_positions(self.model.config, inputs, ids),
            attention_mask={"full_attention": mask},
            use_cache=False,
            **pixels,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _upstream_features(self, pixels: dict[str, torch.Tensor]) -> Any:
        """The vision tower with one full-attention segment for each whole video."""
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

        reference = modeling.get_vision_attention_seqlens
        modeling.get_vision_attention_seqlens = partial(reference, merge_temporal=True)
        try:
            with torch.no_grad():
                return self.model.model.get_video_features(
                    pixels["pixel_values_videos"], pixels["video_grid_thw"], return_dict=True
                )
        finally:
            modeling.get_vision_attention_seqlens = reference


def _path(video: Path | Sampled) -> Path:
    return video.path if isinstance(video, Sampled) else video


def mrope_positions(config: Any, inputs: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[3, 1, length]`` M-RoPE positions (temporal, height, width), one video or image after
    the other: what follows starts one after the largest position so far, in any axis.

    Written here from the models' own definition (Qwen2-VL report, section 2.1), and not taken
    from transformers 5: its ``get_rope_index`` goes on after ``max(height, width)`` only, so
    that text after a video longer than it is wide repeats the video's temporal positions.
    """
    merge = config.vision_config.spatial_merge_size
    per_second = getattr(config.vision_config, "tokens_per_second", None)
    seconds = iter(inputs.get("second_per_grid_ts", ()))
    grids = {
        config.image_token_id: iter(inputs.get("image_grid_thw", ())),
        config.video_token_id: iter(inputs.get("video_grid_thw", ())),
    }
    columns: list[torch.Tensor] = []
    at = start = 0
    while at < len(ids):
        if int(ids[at]) not in grids:
            columns.append(torch.full((3, 1), start))
            at, start = at + 1, start + 1
            continue
        t, h, w = (int(n) for n in next(grids[int(ids[at])]))
        h, w = h // merge, w // merge
        scale = 1.0
        if int(ids[at]) == config.video_token_id and per_second is not None:
            scale = float(next(seconds)) * per_second
        times = (torch.arange(t) * scale).long()
        block = torch.stack(torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij"))
        columns.append(block.reshape(3, -1) + start)
        at, start = at + t * h * w, start + int(block.max()) + 1
    return torch.cat(columns, dim=1)[:, None]


Clip = tuple[torch.Tensor, dict[str, Any]]
"""``[T, 3, H, W]`` frames, T even, and the metadata that transformers takes."""


def reference_inputs(
    processor: Any, prompt: str, clips: Sequence[Clip], images: Sequence[Any] = ()
) -> Any:
    """What transformers' processor makes of a prompt and of videos that are sampled and resized,
    called as Qwen's model cards say."""
    settings: dict[str, Any] = {}
    if clips:
        settings |= {
            "videos": [frames for frames, _ in clips],
            "video_metadata": [metadata for _, metadata in clips],
            "do_sample_frames": False,
        }
    if type(processor).__name__.startswith("Qwen3"):
        settings["videos_kwargs"] = {"do_resize": False}
    if images:
        settings["images"] = list(images)
    return processor(text=[prompt], return_tensors="pt", **settings)


def reference_video(
    video: Path | Sequence[Any],
    settings: Mapping[str, Any],
    *,
    image_patch_size: int = 14,
    resize: str = "uint8",
) -> Clip:
    """A video as qwen-vl-utils gives it, its own reader included.

    Args:
        video: a file, or pictures.
        resize: ``float32`` is its own too, ``uint8`` that of transformers' video processors.
    """
    import qwen_vl_utils.vision_process as reference
    from torchvision.transforms import functional
    from torchvision.transforms.v2 import functional as of_transformers

    chosen = of_transformers.resize if resize == "uint8" else functional.resize
    with mock.patch.object(reference.transforms.functional, "resize", chosen):
        frames, metadata = reference.fetch_video(
            {"video": str(video) if isinstance(video, Path) else video, **settings},
            image_patch_size=image_patch_size,
            return_video_metadata=True,
        )
    return frames, metadata


def upstream_sample(video: Path) -> Clip:
    """The frames that SGLang samples of a video; of their rate its processor learns nothing."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(video))
    total, fps = len(decoder), float(decoder.metadata.average_fps or 0)
    count = int(min(max(total / fps * SAMPLED_FPS, 4), total)) // 2 * 2
    indices = np.linspace(0, total - 1, count, dtype=np.int64)
    frames = decoder.get_frames_at(indices.tolist()).data
    metadata = {"fps": None, "total_num_frames": total, "frames_indices": indices.tolist()}
    return frames, metadata
