"""LongVILA: a tiny checkpoint in the published layout, and the model in plain PyTorch.

The model is written from its definition (github.com/NVlabs/VILA, ``llava/model``): SigLIP's hidden
states before the last layer, squares of 2×2 patches through a small MLP, and Qwen2 over text and
frames, with a newline after each frame. Tower and language model are transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.oracle import Oracle
from support.spec_mask import Steps
from support.tiny import write_tokenizer

VIDEO = "<vila/video>"
IMAGE = "<image>"
NUM_FRAMES = 40  # sampled from every video; a published checkpoint has 256
TOKENS_PER_FRAME = 9  # without the newline
PATCH = 14
SIZE = 5 * PATCH  # an odd number of patches a side, as in the published checkpoint

# Of Qwen2's own tokenizer: a message's content is text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_model(
    directory: Path,
    *,
    seed: int = 0,
    projector: str = "mlp_downsample",
    image_size: int = SIZE,
    num_frames: int = NUM_FRAMES,
    weight_std: float = 0.08,
    **top: Any,
) -> Path:
    """Write a checkpoint as Efficient-Large-Model publishes VILA: ``config.json`` beside ``llm/``,
    ``vision_tower/`` and ``mm_projector/``.

    Args:
        directory: created where it is missing.
        seed: of the weights.
        projector: ``mm_projector_type``.
        image_size: pixels a side.
        num_frames: ``num_video_frames``.
        weight_std: standard deviation of the weight matrices.
        top: further entries of ``config.json``.

    Returns:
        ``directory``
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    llm, tower, mlp = (directory / name for name in ("llm", "vision_tower", "mm_projector"))
    for part in (llm, tower, mlp):
        part.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(llm, chat_template=CHAT_TEMPLATE)
    (llm / "chat_template.json").unlink()  # the published tokenizer has it in its own file
    generator = torch.Generator().manual_seed(seed)

    language_model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=-(-len(token_ids) // 64) * 64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=131072,
            rope_theta=1e6,
            tie_word_embeddings=False,
            bos_token_id=token_ids["<|endoftext|>"],
            eos_token_id=token_ids["<|im_end|>"],
        )
    )
    _randomize(language_model, weight_std, generator)
    language_model.save_pretrained(llm)

    vision = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=PATCH,
        )
    )
    _randomize(vision, weight_std, generator)
    _save(tower, vision.state_dict(), prefix="vision_model.")
    vision.config.architectures = ["SiglipVisionModel"]
    vision.config.save_pretrained(tower)
    _write(
        tower / "preprocessor_config.json",
        {
            "image_processor_type": "SiglipImageProcessor",
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": image_size, "width": image_size},
        },
    )

    layers = _projector(projector, channels=32, hidden=64)
    _randomize(layers, weight_std, generator)
    _save(mlp, layers.state_dict(), prefix="layers.")
    _write(
        mlp / "config.json",
        {
            "architectures": ["MultimodalProjector"],
            "mm_projector_type": projector,
            "model_type": "v2l_projector",
        },
    )
    _write(
        directory / "config.json",
        {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "hidden_size": 64,
            "mm_hidden_size": 32,
            "image_aspect_ratio": "resize",
            "num_video_frames": num_frames,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "cls_patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "s2": False,
            "fps": 0.0,
            "chat_template": None,
            "model_dtype": "torch.bfloat16",
            "resume_path": "./vlm",
            # The reference reads the three directories; these copies may be older than they are.
            "llm_cfg": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            "vision_tower_cfg": {"model_type": "siglip_vision_model", "image_size": 384},
            "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"},
            **top,
        },
    )
    return directory


def _projector(kind: str, *, channels: int, hidden: int) -> torch.nn.Sequential:
    """The layers of a published projector; the first one, without weights, is the merge."""
    nn = torch.nn
    if kind == "mlp_downsample_3x3_fix":
        return nn.Sequential(
            nn.Identity(),
            nn.LayerNorm(9 * channels),
            nn.Linear(9 * channels, 3 * channels),
            nn.GELU(),
            nn.LayerNorm(3 * channels),
            nn.Linear(3 * channels, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
        )
    return nn.Sequential(
        nn.Identity(),
        nn.LayerNorm(4 * channels),
        nn.Linear(4 * channels, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
    )


def _randomize(module: torch.nn.Module, std: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.float().parameters():
            parameter.normal_(
                mean=0.0 if parameter.dim() > 1 else 1.0, std=std, generator=generator
            )


def _save(directory: Path, state: dict[str, torch.Tensor], *, prefix: str) -> None:
    from safetensors.torch import save_file

    state = {name if name.startswith(prefix) else prefix + name: t for name, t in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


class LongVilaOracle(Oracle):
    """Args:
    model: directory of the checkpoint.
    """

    def __init__(self, model: Path) -> None:
        from safetensors.torch import load_file
        from transformers import (
            AutoTokenizer,
            Qwen2ForCausalLM,
            SiglipImageProcessorPil,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        config = json.loads((model / "config.json").read_text())
        projector = json.loads((model / "mm_projector" / "config.json").read_text())
        self.num_frames: int = config["num_video_frames"]
        self.rate = 3 if "3x3" in projector["mm_projector_type"] else 2
        self.tokenizer = AutoTokenizer.from_pretrained(model / "llm")
        self.tokenizer.add_tokens([IMAGE, VIDEO], special_tokens=True)
        self.image_processor = SiglipImageProcessorPil.from_pretrained(model / "vision_tower")
        self.llm = Qwen2ForCausalLM.from_pretrained(
            model / "llm", dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        vision_config = SiglipVisionConfig.from_pretrained(model / "vision_tower")
        self.tower = SiglipVisionModel(vision_config).eval()
        _load(self.tower, load_file(model / "vision_tower" / "model.safetensors"), "vision_model.")
        self.mlp = _projector(
            projector["mm_projector_type"],
            channels=vision_config.hidden_size,
            hidden=self.llm.config.hidden_size,
        ).eval()
        _load(self.mlp, load_file(model / "mm_projector" / "model.safetensors"), "layers.")
        side = -(-(vision_config.image_size // vision_config.patch_size) // self.rate)
        self.tokens_per_frame = side * side
        self.newline = self.tokenizer("\n").input_ids

    def inputs(self, prompt: str, videos: Sequence[Path], images: Sequence[Any] = ()) -> Any:
        """``input_ids``, ``pixels`` (one tensor a video or image, in prompt order) and the start
        of each one's tokens."""
        placeholders = {
            self.tokenizer.convert_tokens_to_ids(VIDEO): iter(
                [("video", self.pixels(sample(video, self.num_frames))) for video in videos]
            ),
            self.tokenizer.convert_tokens_to_ids(IMAGE): iter(
                [("image", self.pixels([image])) for image in images]
            ),
        }
        ids: list[int] = []
        media: list[tuple[str, torch.Tensor, int]] = []
        for token in self.tokenizer(prompt).input_ids:
            if token not in placeholders:
                ids.append(token)
                continue
            kind, pixels = next(placeholders[token])
            media.append((kind, pixels, len(ids)))
            ids += ([token] * self.tokens_per_frame + self.newline) * len(pixels)
        return {"input_ids": torch.tensor([ids]), "media": media}

    def videos(self, inputs: Any) -> list[Steps]:
        return [self._steps(*item[1:]) for item in inputs["media"] if item[0] == "video"]

    def images(self, inputs: Any) -> list[tuple[int, int]]:
        return [self._steps(*item[1:])[0] for item in inputs["media"] if item[0] == "image"]

    def _steps(self, pixels: torch.Tensor, start: int) -> Steps:
        size = self.tokens_per_frame + len(self.newline)
        return [(start + i * size, start + (i + 1) * size) for i in range(len(pixels))]

    def logits(self, inputs: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        vocabulary = self.llm.config.vocab_size
        embeds = self.llm.model.embed_tokens(ids.clamp(max=vocabulary - 1))
        for _, pixels, start in inputs["media"]:
            for (first, _), frame in zip(
                self._steps(pixels, start), self.features(pixels), strict=True
            ):
                embeds[first : first + self.tokens_per_frame] = frame
        out = self.llm(
            inputs_embeds=embeds[None],
            attention_mask={"full_attention": mask},
            use_cache=False,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def pixels(self, images: Sequence[Any]) -> torch.Tensor:
        """``[frames, 3, size, size]``: the frames resized and normalized."""
        pixels: torch.Tensor = self.image_processor(images, return_tensors="pt").pixel_values
        return pixels

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[frames, tokens_per_frame, hidden]``"""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        frames, patches, channels = hidden.shape
        side = int(patches**0.5)
        grid = hidden.reshape(frames, side, side, channels)
        merged = []
        for row in range(0, side, self.rate):
            for column in range(0, side, self.rate):
                square = [
                    grid[:, row + i, column + j]
                    if row + i < side and column + j < side
                    else torch.zeros(frames, channels)
                    for i in range(self.rate)
                    for j in range(self.rate)
                ]
                merged.append(torch.cat(square, dim=-1))
        features: torch.Tensor = self.mlp(torch.stack(merged, dim=1))
        return features


def _load(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str) -> None:
    """Strictly, whether or not this release of the module writes the prefix itself."""
    if not any(name.startswith(prefix) for name in module.state_dict()):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    module.load_state_dict(state)


def sample(video: Path, count: int) -> list[Any]:
    """The frames that VILA samples: evenly, first and last among them (``llava/utils/media.py``).

    Returns:
        PIL images; those of a short video repeat.
    """
    from PIL import Image
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(video), dimension_order="NHWC")
    indices = np.round(np.linspace(0, len(decoder) - 1, count)).astype(int)
    frames = decoder.get_frames_at(indices.tolist()).data.numpy()
    return [Image.fromarray(frame) for frame in frames]
