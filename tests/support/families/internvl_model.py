"""A tiny random InternVL3.5 in the published layout: no download, loads like the real one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from support.tiny import write_json, write_tokenizer

SIZE = 448  # pixels a side of a tile
TOKENS = 16  # of a tile: 8 x 8 patches, of which four become one
CONTEXT = "<IMG_CONTEXT>"

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<img>", "</img>", CONTEXT),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)

# Of Qwen's tokenizers: a run of newlines is one token, digits stand alone.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "system user assistant Frame: What happens in the video?\n\nWhich\n\n\nis it?\n"
    "Frame\nKeyFrame\n"
)
_FINISHED = "tiny.json"  # written last: its presence says that the model is whole


def make_tiny_model(
    directory: Path, *, moe: bool = False, weight_std: float = 0.08, seed: int = 0
) -> Path:
    """Write model and tokenizer as they are published, unless the directory holds them already.

    Hugging Face's own layout of the same weights lies in the sub-directory ``reference``.

    Args:
        directory: a sub-directory of it becomes the model's, since SGLang knows the model by name.
        moe: whether the language model is Qwen3-MoE, with eight experts.
        weight_std: standard deviation of the weight matrices.
        seed: of the weights.

    Returns:
        The model's directory.
    """
    directory = Path(directory) / "InternVL3_5-tiny"
    settings = {"moe": moe, "weight_std": weight_std, "seed": seed, "recipe": 2}
    finished = directory / _FINISHED
    if finished.exists() and json.loads(finished.read_text()) == settings:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(
        directory, _CORPUS, chat_template=None, special_tokens=SPECIAL_TOKENS, pieces=_PIECES
    )
    model = _reference_model(token_ids, moe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=weight_std, generator=generator)
            elif "lambda" in name or name.endswith("bias"):
                parameter.normal_(mean=float("lambda" in name), std=0.1, generator=generator)
    model.save_pretrained(directory / "reference")
    _write_published(directory, model, moe)
    finished.write_text(json.dumps(settings))
    return directory


def _reference_model(token_ids: dict[str, int], moe: bool) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    text: dict[str, Any] = {
        "model_type": "qwen3_moe" if moe else "qwen3",
        "vocab_size": -(-len(token_ids) // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
    }
    if moe:
        text |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_bias": True,
        "use_qk_norm": False,
        "image_size": [SIZE, SIZE],
        "patch_size": [SIZE // 8, SIZE // 8],
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
    }
    config = transformers.InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids[CONTEXT],
        image_seq_length=TOKENS,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config).to(torch.float32).eval()


_PUBLISHED_NAMES = (  # Hugging Face's name → the published one
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^model\.vision_tower\.", "vision_model."),
    (r"\.embeddings\.cls_token$", ".embeddings.class_embedding"),
    (r"\.embeddings\.position_embeddings$", ".embeddings.position_embedding"),
    (r"\.patch_embeddings\.projection\.", ".patch_embedding."),
    (r"^vision_model\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_", ".ls"),
)


def _write_published(directory: Path, model: Any, moe: bool) -> None:
    """``config.json`` and weights as OpenGVLab publishes them for ``InternVLChatModel``."""
    from safetensors.torch import save_file

    text = model.config.text_config.to_dict()
    text |= {"architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"]}
    write_json(
        directory / "config.json",
        {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": SIZE,
            "llm_config": text,
            "max_dynamic_patch": 12,
            "min_dynamic_patch": 1,
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_thumbnail": True,
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                "attention_dropout": 0.0,
                "drop_path_rate": 0.0,
                "dropout": 0.0,
                "hidden_act": "gelu",
                "hidden_size": 64,
                "image_size": SIZE,
                "initializer_factor": 1.0,
                "intermediate_size": 128,
                "layer_norm_eps": 1e-6,
                "norm_type": "layer_norm",
                "num_attention_heads": 4,
                "num_channels": 3,
                "num_hidden_layers": 2,
                "patch_size": SIZE // 8,
                "qk_normalization": False,
                "qkv_bias": True,
            },
        },
    )
    save_file(published_weights(model), directory / "model.safetensors")


def published_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of Hugging Face's model under the published names, one expert a tensor."""
    found = dict(model.state_dict())
    weights: dict[str, torch.Tensor] = {}
    for name, weight in found.items():
        if ".attention.q_proj." in name:
            weight = torch.cat([found[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("q_proj", "qkv")
        elif re.search(r"\.attention\.[kv]_proj\.", name):
            continue
        for pattern, published in _PUBLISHED_NAMES:
            name = re.sub(pattern, published, name)
        for part, tensor in _experts(name, weight):
            weights[part] = tensor.clone().contiguous()
    return weights


def _experts(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return [(name, weight)]
    prefix, kind = name.rsplit(".", 1)
    parts: list[tuple[str, torch.Tensor]] = []
    for i, expert in enumerate(weight):
        if kind == "down_proj":
            parts.append((f"{prefix}.{i}.down_proj.weight", expert))
        else:
            gate, up = expert.chunk(2)
            parts += [
                (f"{prefix}.{i}.gate_proj.weight", gate),
                (f"{prefix}.{i}.up_proj.weight", up),
            ]
    return parts
