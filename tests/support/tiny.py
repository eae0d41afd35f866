"""A tiny random Qwen2-VL or Qwen2.5-VL, made on the spot: no download, loads like the real one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl")

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = "system user assistant You are a helpful assistant. What happens in the video?"

MAX_POSITIONS = 131072
_SETTINGS_FILE = "tiny.json"  # written last: its presence says that the model is whole
_RECIPE = 2  # raise it when the same settings give another model


def make_tiny_model(
    directory: Path,
    *,
    architecture: str = "qwen2_5_vl",
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 256,
    vision_depth: int = 2,
    vision_hidden_size: int = 64,
    vision_num_heads: int = 4,
    fullatt_block_indexes: Sequence[int] | None = None,
    weight_std: float = 0.08,
) -> Path:
    """Write model, tokenizer and processor files, unless the directory holds them already.

    Weights are random, and large enough for attention to be peaked: with the usual 0.02 every mask
    gives nearly the same output.

    Args:
        directory: created where it is missing.
        architecture: one of ``ARCHITECTURES``.
        seed: of the weights.
        num_layers, hidden_size, num_heads, num_kv_heads, intermediate_size: the language model.
        vision_depth, vision_hidden_size, vision_num_heads: the vision tower.
        fullatt_block_indexes: layers of Qwen2.5-VL's vision tower that attend over a whole step;
            the others attend in windows. None makes the last layer one, as the released models do.
        weight_std: standard deviation of the weight matrices.

    Returns:
        ``directory``

    Raises:
        ValueError: an unknown architecture, or heads that do not fit the hidden size.
    """
    settings = {name: value for name, value in locals().items() if name != "directory"}
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    head_dim, rest = divmod(hidden_size, num_heads)
    if rest or head_dim % 16:
        raise ValueError(
            "hidden_size / num_heads: expected a multiple of 16, which M-RoPE splits in three, "
            f"got {hidden_size} / {num_heads}"
        )
    if fullatt_block_indexes is None:
        settings["fullatt_block_indexes"] = [vision_depth - 1]
    settings["recipe"] = _RECIPE
    directory = Path(directory)
    finished = directory / _SETTINGS_FILE
    if finished.exists():
        if json.loads(finished.read_text()) == json.loads(json.dumps(settings)):
            return directory
        finished.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(directory)
    _write_processor(directory)
    _write_weights(directory, token_ids, settings)
    finished.write_text(json.dumps(settings))
    return directory


def write_tokenizer(
    directory: Path,
    text: str = TEXT,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    pieces: str | None = None,
) -> dict[str, int]:
    """A byte-level BPE of a few hundred tokens.

    Args:
        directory: of the model.
        text: whose words become tokens.
        chat_template: in Jinja; None writes none.
        special_tokens: the first pads.
        pieces: regular expression of what a token never crosses; None is GPT-2's.

    Returns:
        All token ids.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pieces is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 10, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = {} if chat_template is None else {"chat_template": chat_template}
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": MAX_POSITIONS,
            "pad_token": special_tokens[0],
            "eos_token": "<|im_end|>",
            **template,
            "additional_special_tokens": list(special_tokens[1:]),
        },
    )
    if template:
        write_json(directory / "chat_template.json", template)
    return dict(tokenizer.get_vocab())


def _write_processor(directory: Path) -> None:
    shared = {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        # Qwen2-VL's processor does the same, and SGLang takes either.
        "processor_class": "Qwen2_5_VLProcessor",
    }
    write_json(
        directory / "preprocessor_config.json",
        {**shared, "image_processor_type": "Qwen2VLImageProcessor"},
    )
    write_json(
        directory / "video_preprocessor_config.json",
        {**shared, "video_processor_type": "Qwen2VLVideoProcessor"},
    )


def _write_weights(directory: Path, token_ids: dict[str, int], settings: dict[str, Any]) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    old = settings["architecture"] == "qwen2_vl"
    prefix = "Qwen2VL" if old else "Qwen2_5_VL"
    config = getattr(transformers, f"{prefix}Config")(
        text_config=_text_config(token_ids, settings),
        vision_config=_qwen2_vision(settings) if old else _qwen2_5_vision(settings),
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        vision_token_id=token_ids["<|vision_pad|>"],
    )
    generator = torch.Generator().manual_seed(settings["seed"])
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=settings["weight_std"], generator=generator)
    model.save_pretrained(directory)


def _text_config(token_ids: dict[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    quarter = settings["hidden_size"] // settings["num_heads"] // 16
    return {
        "vocab_size": -(-len(token_ids) // 64) * 64,
        "hidden_size": settings["hidden_size"],
        "intermediate_size": settings["intermediate_size"],
        "num_hidden_layers": settings["num_layers"],
        "num_attention_heads": settings["num_heads"],
        "num_key_value_heads": settings["num_kv_heads"],
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 1e6,
        # Time, height and width in the proportion of the released models, 16 : 24 : 24.
        "rope_scaling": {"type": "mrope", "mrope_section": [2 * quarter, 3 * quarter, 3 * quarter]},
        "tie_word_embeddings": False,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
    }


def _qwen2_5_vision(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": settings["vision_depth"],
        "hidden_size": settings["vision_hidden_size"],
        "intermediate_size": 2 * settings["vision_hidden_size"],
        "num_heads": settings["vision_num_heads"],
        "out_hidden_size": settings["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(settings["fullatt_block_indexes"]),
        "in_channels": 3,
        "tokens_per_second": 2,
    }


def _qwen2_vision(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": settings["vision_depth"],
        "embed_dim": settings["vision_hidden_size"],
        "hidden_size": settings["hidden_size"],
        "mlp_ratio": 2,
        "num_heads": settings["vision_num_heads"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "in_chans": 3,  # the name that the released configurations and SGLang use
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration file."""
    path.write_text(json.dumps(content, indent=2))
