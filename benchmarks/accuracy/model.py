"""The small Qwen2.5-VL: configuration, tokenizer and processor files, M-RoPE positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accuracy.questions import vocabulary
from accuracy.videos import FRAME

STEP_TOKENS = 4  # of a frame of 56 x 56 pixels: patches of 14, merged 2 x 2
SYSTEM = "You are a helpful assistant."
# A prompt up to its video's tokens, and from their end on.
BEFORE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
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
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
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
# How Qwen2's tokenizer cuts text into words: digits one by one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_POSITIONS = 32768


def write_tokenizer(directory: Path) -> dict[str, int]:
    """A byte-level BPE that holds every word of the questions as one token.

    Returns:
        token → id
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary(), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": _MAX_POSITIONS,
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "chat_template": CHAT_TEMPLATE,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        },
    )
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return dict(tokenizer.get_vocab())


def write_processor(directory: Path) -> None:
    """Processor files that leave frames of 56 x 56 pixels as they are."""
    shared = {
        "min_pixels": FRAME * FRAME,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "processor_class": "Qwen2_5_VLProcessor",
    }
    _write_json(
        directory / "preprocessor_config.json",
        {**shared, "image_processor_type": "Qwen2VLImageProcessor"},
    )
    _write_json(
        directory / "video_preprocessor_config.json",
        {**shared, "video_processor_type": "Qwen2VLVideoProcessor"},
    )


def make_model(token_ids: dict[str, int], seed: int) -> Any:
    """Hugging Face's ``Qwen2_5_VLForConditionalGeneration`` of about 2 million parameters."""
    import transformers

    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(token_ids) // 64) * 64,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": _MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            # Half of a head of 32 goes to time, and half a wave of its slowest frequency (177
            # positions) spans the longest video; height and width hardly turn, so that text and
            # video tokens match by content at any distance.
            "rope_theta": 1e4,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]},
            "tie_word_embeddings": False,
            "bos_token_id": token_ids["<|endoftext|>"],
            "eos_token_id": token_ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 192,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "in_channels": 3,
            "tokens_per_second": 2,
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        vision_token_id=token_ids["<|vision_pad|>"],
    )
    torch.manual_seed(seed)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.float32)


def patches(frames: torch.Tensor) -> torch.Tensor:
    """The video processor's patches of steps that need no resize.

    Args:
        frames: ``[steps, 2, 3, FRAME, FRAME]`` fp32, 0 to 255.

    Returns:
        ``[steps * 16, 3 * 2 * 14 * 14]`` fp32, the four patches of a token next to each other.
    """
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (MEAN, STD))
    x = (frames - mean) / std
    n = len(x)
    x = x.reshape(n, 2, 3, 2, 2, 14, 2, 2, 14)  # step, frame, channel, H, h, py, W, w, px
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(n * 16, -1)


def video_positions(start: int, steps: int, step_positions: int = 2) -> tuple[torch.Tensor, int]:
    """M-RoPE positions of a video of 2 x 2 tokens a step, and where the text after it goes on.

    Args:
        start: position of its first token.
        step_positions: temporal positions from step to step: seconds a step times
            ``tokens_per_second``.

    Returns:
        ``[3, steps * 4]`` int64 and one more than the largest.
    """
    block = torch.stack(
        torch.meshgrid(
            torch.arange(steps) * step_positions, torch.arange(2), torch.arange(2), indexing="ij"
        )
    ).reshape(3, -1)
    return block + start, start + int(block.max()) + 1


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
