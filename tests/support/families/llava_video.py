"""LLaVA-Video: a tiny random checkpoint in the published layout, and the reference in PyTorch.

The reference is LLaVA-NeXT's, written from its definition: SigLIP's features before its last layer,
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

from support.oracle import IMAGE_RUN_GAP, Oracle
from support.spec_mask import Steps

PLACEHOLDER_ID = 151646  # of the published configuration; the tokenizer does not know it
CHAT_TEMPLATE = (  # of the published tokenizer: text alone
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUM_FRAMES = 24  # of the test servers, by their flag
IMAGE_SIDE, PATCH = 70, 14  # 5 features a side of a frame, pooled to 3: odd, as published
TOWER = "google-siglip"

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PREPROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
}


def make_tiny_model(
    directory: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    vision_layers: int = 3,
    vision_hidden_size: int = 32,
    weight_std: float = 0.08,
    newline: str = "grid",
    pool_mode: str = "bilinear",
) -> Path:
    """Write a checkpoint as published: no processor files, the tower's weights without its last
    layer; and, in a directory of its own, the tower that ``mm_vision_tower`` names.

    Args:
        directory: created where it is missing.
        seed: of the weights.
        num_layers, hidden_size: of the language model.
        vision_layers, vision_hidden_size: of the vision tower.
        weight_std: standard deviation of the weight matrices; large, so that attention is peaked.
        newline, pool_mode: ``mm_newline_position`` and ``mm_spatial_pool_mode``.

    Returns:
        ``directory``
    """
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    directory = Path(directory)
    if (directory / "model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(directory)
    generator = torch.Generator().manual_seed(seed)
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision_hidden_size,
            intermediate_size=2 * vision_hidden_size,
            num_hidden_layers=vision_layers,
            num_attention_heads=2,
            image_size=IMAGE_SIDE,
            patch_size=PATCH,
        )
    )
    _randomize(tower, generator, weight_std)
    tower.save_pretrained(directory / TOWER)
    _write(directory / TOWER / "preprocessor_config.json", _PREPROCESSOR)
    _randomize(tower, generator, weight_std)  # the checkpoint's own: the tower is fine-tuned
    text = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": -(-vocabulary // 64) * 64,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    language = Qwen2ForCausalLM(Qwen2Config(**text))
    _randomize(language, generator, weight_std)
    weights = dict(language.state_dict())
    last = f"encoder.layers.{vision_layers - 1}."
    for name, weight in tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        if not name.startswith((last, "head.")):
            weights[f"model.vision_tower.vision_tower.vision_model.{name}"] = weight
    for i, inputs in ((0, vision_hidden_size), (2, hidden_size)):
        size = (hidden_size, inputs)
        weights[f"model.mm_projector.{i}.weight"] = torch.randn(size, generator=generator) * 0.2
        weights[f"model.mm_projector.{i}.bias"] = torch.randn(hidden_size, generator=generator)
    weights["model.image_newline"] = torch.randn(hidden_size, generator=generator)
    _write(
        directory / "config.json",
        text
        | {
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": "llava",
            "torch_dtype": "bfloat16",
            "add_faster_video": False,
            "add_time_instruction": True,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "force_sample": True,
            "image_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": [[70 * i, 70 * j] for i in range(1, 7) for j in range(1, 7)],
            "image_token_index": PLACEHOLDER_ID,
            "mm_hidden_size": vision_hidden_size,
            "mm_newline_position": newline,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_spatial_pool_mode": pool_mode,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": str(directory / TOWER),
            "rope_scaling": None,
            "sliding_window": 131072,
            "use_sliding_window": False,
        },
    )
    save_file({k: v.contiguous() for k, v in weights.items()}, directory / "model.safetensors")
    return directory


def _randomize(model: Any, generator: torch.Generator, std: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std, generator=generator)


def _write_tokenizer(directory: Path) -> int:
    """A byte-level BPE of a few hundred tokens; returns how many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = "system user assistant You are a helpful assistant. What happens in the video?"
    tokenizer.train_from_iterator([corpus] * 10, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
        "additional_special_tokens": list(_SPECIAL[1:]),
    }
    _write(directory / "tokenizer_config.json", settings)
    return int(tokenizer.get_vocab_size())


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


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
