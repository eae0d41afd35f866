"""A tiny random LLaVA-Video in the layout of the published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.tiny import write_json, write_tokenizer

PLACEHOLDER_ID = 151646  # of the published configuration; the tokenizer does not know it
CHAT_TEMPLATE = (  # of the published tokenizer: text alone
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE_SIDE, PATCH = 70, 14  # 5 features a side of a frame, pooled to 3: odd, as published
TOWER = "google-siglip"

_CORPUS = "system user assistant You are a helpful assistant. What happens in the video?"
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
    vocabulary = len(
        write_tokenizer(directory, _CORPUS, chat_template=CHAT_TEMPLATE, special_tokens=_SPECIAL)
    )
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
    write_json(directory / TOWER / "preprocessor_config.json", _PREPROCESSOR)
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
    write_json(
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
