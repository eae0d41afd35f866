"""LLaVA-Video: the reference in PyTorch.

It is LLaVA-NeXT's, written from its definition: SigLIP's features before its last layer,
two linear layers with GELU, 2×2 pooling, a newline after each row of a frame, Qwen2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from support.families.llava_video_tiny import IMAGE_SIDE, PLACEHOLDER_ID, TOWER
from support.oracle import IMAGE_RUN_GAP, Oracle
from support.spec_mask import Steps

NUM_FRAMES = 24  # of the test servers, by their flag


@dataclass(frozen=True)
class Medium:
    """A video, an image or a frame of a list, where it stands in the prompt.

    Attributes:
        kind: ``video``, ``image`` or ``frame``.
        start: its first token.
        frames: how many, of a video.
        features: ``[tokens, hidden]``.
    """

    kind: str
    start: int
    frames: int
    features: torch.Tensor

    @property
    def end(self) -> int:
        return self.start + len(self.features)


class LlavaVideoOracle(Oracle):
    """Args:
    model: directory of the checkpoint.
    """

    def __init__(self, model: Path) -> None:
        from safetensors.torch import load_file
        from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipVisionModel

        self.config = json.loads((model / "config.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        weights = load_file(model / "model.safetensors")
        names = Qwen2Config().to_dict().keys() - {"model_type", "architectures"}
        text = {k: v for k, v in self.config.items() if k in names or k == "rope_theta"}
        text |= {"dtype": "float32", "use_sliding_window": False, "sliding_window": None}
        self.language = Qwen2ForCausalLM(Qwen2Config(**text)).float().eval()
        self.language.load_state_dict(
            {k: v for k, v in weights.items() if k in self.language.state_dict()}
        )
        self.tower = _published_tower(SiglipVisionModel, model / TOWER, weights)
        self.weights = {k: v.float() for k, v in weights.items()}

    def inputs(
        self,
        prompt: str,
        videos: Sequence[Path],
        images: Sequence[Any] = (),
        *,
        listed: bool = False,
        max_frames: int = NUM_FRAMES,
        fps: float | None = None,
    ) -> Any:
        """Args:
        prompt: with ``<video>`` or ``<image>`` where a medium stands.
        videos: files.
        images: pictures or, with ``listed``, the frames of a video.
        listed: see ``images``.
        max_frames, fps: how each video is sampled.
        """
        clips = iter([frames_of(video, max_frames, fps) for video in videos])
        pictures = iter(images)
        ids: list[int] = []
        media: list[Medium] = []
        for i, text in enumerate(prompt.replace("<video>", "<image>\0").split("<image>")):
            if i and text.startswith("\0"):
                frames = next(clips)
                media.append(Medium("video", len(ids), len(frames), self.video(frames)))
            elif i and listed:
                media.append(Medium("frame", len(ids), 1, self.video([next(pictures)])))
            elif i:
                alone = len(images) == 1 and not videos
                media.append(Medium("image", len(ids), 1, self.image(next(pictures), alone)))
            if i:
                ids += [PLACEHOLDER_ID] * len(media[-1].features)
            ids += self.tokenizer(text.removeprefix("\0")).input_ids
        return {"input_ids": torch.tensor([ids]), "media": media}

    def videos(self, inputs: Any) -> list[Steps]:
        found: list[list[tuple[int, int]]] = []
        listed = -math.inf
        for medium in inputs["media"]:
            steps = [
                (medium.start + i * size, medium.start + (i + 1) * size)
                for size in [len(medium.features) // medium.frames]
                for i in range(medium.frames)
            ]
            if medium.kind == "frame" and medium.start - listed <= IMAGE_RUN_GAP:
                found[-1] += steps
            elif medium.kind != "image":
                found.append(steps)
            if medium.kind == "frame":
                listed = medium.end
        return [*found]

    def images(self, inputs: Any) -> list[tuple[int, int]]:
        return [(m.start, m.end) for m in inputs["media"] if m.kind == "image"]

    def logits(self, inputs: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        is_medium = ids == PLACEHOLDER_ID
        embeddings = self.language.model.embed_tokens(ids.masked_fill(is_medium, 0))
        for medium in inputs["media"]:
            embeddings[medium.start : medium.end] = medium.features
        out = self.language(
            inputs_embeds=embeddings[None],
            attention_mask={"full_attention": mask},
            use_cache=False,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    # --- The vision path ----------------------------------------------------------------------

    @torch.no_grad()
    def video(self, frames: Sequence[Image.Image]) -> torch.Tensor:
        """Features of a video, a token a row."""
        features = self._project(torch.stack([pixels_of(frame) for frame in frames]))
        hidden = features.shape[-1]
        newline = self.weights["model.image_newline"]
        tokens: list[torch.Tensor] = []
        for frame in features:
            rows = self._pool(frame.view(5, 5, hidden))
            for row in rows:
                tokens += [*row, newline] if self.config["mm_newline_position"] == "grid" else row
            if self.config["mm_newline_position"] == "frame":
                tokens.append(newline)
        if self.config["mm_newline_position"] == "one_token":
            tokens.append(newline)
        return torch.stack(tokens)

    def _pool(self, frame: torch.Tensor) -> torch.Tensor:
        """``[5, 5, hidden]`` → ``[3, 3, hidden]``, or ``[2, 2, hidden]`` without interpolation."""
        if self.config["mm_spatial_pool_mode"] == "bilinear":
            grid = frame.permute(2, 0, 1)[None]
            pooled = functional.interpolate(grid, size=(3, 3), mode="bilinear")[0]
            return pooled.permute(1, 2, 0)
        squares = frame[:4, :4].view(2, 2, 2, 2, -1)
        if self.config["mm_spatial_pool_mode"] == "average":
            return squares.mean(dim=(1, 3))
        return squares.amax(dim=(1, 3))

    @torch.no_grad()
    def image(self, image: Image.Image, alone: bool) -> torch.Tensor:
        """Features of a picture: padded to a square, or, alone, whole and in tiles."""
        newline = self.weights["model.image_newline"]
        if not alone:
            side = max(image.size)
            square = Image.new("RGB", (side, side), (127, 127, 127))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            return torch.cat([self._project(pixels_of(square)[None])[0], newline[None]])
        columns, rows = _best_grid(image.size, self.config["image_grid_pinpoints"])
        scale = min(columns * IMAGE_SIDE / image.width, rows * IMAGE_SIDE / image.height)
        width = min(math.ceil(image.width * scale), columns * IMAGE_SIDE)
        height = min(math.ceil(image.height * scale), rows * IMAGE_SIDE)
        canvas = Image.new("RGB", (columns * IMAGE_SIDE, rows * IMAGE_SIDE))
        at = (canvas.width - width) // 2, (canvas.height - height) // 2
        canvas.paste(image.resize((width, height)), at)
        tiles = [image.resize((IMAGE_SIDE, IMAGE_SIDE))]
        for row in range(rows):
            for column in range(columns):
                left, top = column * IMAGE_SIDE, row * IMAGE_SIDE
                tiles.append(canvas.crop((left, top, left + IMAGE_SIDE, top + IMAGE_SIDE)))
        features = self._project(torch.stack([pixels_of(tile) for tile in tiles]))
        grid = torch.cat(
            [
                torch.cat([f.view(5, 5, -1) for f in features[1 + r * columns :][:columns]], dim=1)
                for r in range(rows)
            ]
        )
        grid = _unpadded(grid, image.size)
        times = math.sqrt(grid.shape[0] * grid.shape[1] / (9 * 25))
        if times > 1.1:
            size = (int(grid.shape[0] // times), int(grid.shape[1] // times))
            planes = functional.interpolate(grid.permute(2, 0, 1)[None], size, mode="bilinear")
            grid = planes[0].permute(1, 2, 0)
        lines = [torch.cat([line, newline[None]]) for line in grid]
        return torch.cat([features[0], *lines])

    def _project(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[frames, 3, side, side]`` → ``[frames, 25, hidden]``"""
        features = self.tower(pixels).last_hidden_state
        for i in (0, 2):
            weight = self.weights[f"model.mm_projector.{i}.weight"]
            features = functional.linear(
                features, weight, self.weights[f"model.mm_projector.{i}.bias"]
            )
            features = functional.gelu(features) if i == 0 else features
        return features


def _published_tower(model_class: Any, directory: Path, weights: Mapping[str, torch.Tensor]) -> Any:
    """The tower without its last layer, norm and head, as LLaVA-NeXT cuts it."""
    tower = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    trunk = getattr(tower, "vision_model", tower)
    del trunk.encoder.layers[-1:]
    prefix = "model.vision_tower.vision_tower.vision_model."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    missing, unexpected = trunk.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(name.startswith("head.") for name in missing)
    trunk.post_layernorm = torch.nn.Identity()
    return tower


def frames_of(video: Path, frames: int, fps: float | None = None) -> list[Image.Image]:
    """The frames that LLaVA-NeXT's ``load_video`` samples; ``force_sample`` without ``fps``."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(video), dimension_order="NHWC")
    count, rate = len(decoder), decoder.metadata.average_fps
    assert rate is not None
    indices = list(range(0, count, round(rate / fps))) if fps else []
    if fps is None or len(indices) > frames:
        indices = np.linspace(0, count - 1, frames, dtype=int).tolist()
    return [Image.fromarray(decoder.get_frame_at(i).data.numpy()) for i in indices]


def pixels_of(image: Image.Image) -> torch.Tensor:
    """``[3, side, side]``: resized by PIL, to -1 … 1."""
    resized = image.convert("RGB").resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
    pixels = (np.asarray(resized, dtype=np.float32) / 255 - 0.5) / 0.5
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _best_grid(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Columns and rows of tiles: those that keep most of the picture, and waste least."""

    def worth(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[0] / size[0], pinpoint[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=worth)
    return best[0] // IMAGE_SIDE, best[1] // IMAGE_SIDE


def _unpadded(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Without the rows or columns that the padding of the picture became."""
    rows, columns = grid.shape[:2]
    if size[0] / size[1] > columns / rows:
        cut = (rows - int(size[1] * (columns / size[0]))) // 2
        return grid[cut : rows - cut]
    cut = (columns - int(size[0] * (rows / size[1]))) // 2
    return grid[:, cut : columns - cut]
