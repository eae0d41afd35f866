"""Qwen3-VL and Qwen3-VL-MoE: a tiny random model, and Hugging Face's own as its oracle."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from support.families.qwen_vl import QwenVLOracle
from support.spec_mask import Steps
from support.tiny import MAX_POSITIONS, TEXT, write_json, write_tokenizer

_VOCABULARY = TEXT + " <0.1 seconds> yes.< no! <9.7 seconds>"
_PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
_STEP = re.compile(r"<\d+\.\d seconds><\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>")


def make_tiny_model(
    directory: Path,
    *,
    moe: bool = False,
    seed: int = 0,
    num_layers: int = 4,
    hidden_size: int = 128,
    weight_std: float = 0.08,
) -> Path:
    """Write model, tokenizer and processor files.

    Weights are random, and large enough for attention to be peaked. Three levels of the vision
    tower feed the first three layers of the language model, as in the published checkpoints.

    Args:
        directory: created where it is missing.
        moe: whether the language model has experts (4, of which 2 serve a token).
        seed: of the weights.
        num_layers: of the language model.
        hidden_size: of the language model; a multiple of 64.
        weight_std: standard deviation of the weight matrices.

    Returns:
        ``directory``
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    directory.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(directory, _VOCABULARY)
    _write_processor(directory)
    text = _text_config(token_ids, num_layers, hidden_size)
    prefix = "Qwen3VL"
    if moe:
        prefix = "Qwen3VLMoe"
        text |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        }
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text,
        vision_config=_vision_config(hidden_size),
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=weight_std, generator=generator)
        # No placeholder in an answer, which Hugging Face's model would take for one of a video.
        model.lm_head.weight[[config.image_token_id, config.video_token_id]] = 0.0
    model.save_pretrained(directory)
    if moe:
        _publish_experts(directory / "model.safetensors")
    return directory


def _publish_experts(weights: Path) -> None:
    """Transpose experts to the published layout, ``[expert, in, out]``.

    transformers 5 loads either layout and saves its own, ``[expert, out, in]``; SGLang loads the
    published one.
    """
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.mT.contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})


def _write_processor(directory: Path) -> None:
    """The published files, but for a lower bound of an image's size that is as low as a video's."""
    shared = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    write_json(
        directory / "preprocessor_config.json",
        {
            **shared,
            "size": {"longest_edge": 16777216, "shortest_edge": 4096},
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
    )
    write_json(
        directory / "video_preprocessor_config.json",
        {
            **shared,
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    )


def _text_config(token_ids: dict[str, int], num_layers: int, hidden_size: int) -> dict[str, Any]:
    return {
        "vocab_size": -(-len(token_ids) // 64) * 64,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            # In the proportion of the released models, 24 : 20 : 20.
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
    }


def _vision_config(hidden_size: int) -> dict[str, Any]:
    return {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 100,  # a side of 10, to which no clip's grid is equal
        "deepstack_visual_indexes": [0, 1, 2],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
    }


def find_steps(tokenizer: Any, ids: Sequence[int], lengths: Sequence[int]) -> list[Steps]:
    """The steps of each video, found as ``<t seconds><|vision_start|>…<|vision_end|>`` in the text
    of the prompt. A token with characters on both sides of a step's start is before it.

    Args:
        tokenizer: of the model.
        ids: of the expanded prompt, with the placeholder token itself.
        lengths: steps of each video.
    """
    piece = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in set(ids)}
    starts = [0, *accumulate(len(piece[i]) for i in ids)]
    steps = [
        (bisect_left(starts, match.start()), bisect_left(starts, match.end()))
        for match in _STEP.finditer("".join(piece[i] for i in ids))
    ]
    assert len(steps) == sum(lengths), "every step was found"
    ends = list(accumulate(lengths))
    return [steps[end - length : end] for end, length in zip(ends, lengths, strict=True)]


class Qwen3VLOracle(QwenVLOracle):
    """Args:
    model: directory of the checkpoint.
    """

    def __init__(self, model: Path) -> None:
        super().__init__(model)

    def videos(self, inputs: Any) -> list[Steps]:
        lengths = [int(t) for t, _, _ in inputs.get("video_grid_thw", ())]
        return find_steps(self.processor.tokenizer, inputs["input_ids"][0].tolist(), lengths)

    def logits(self, inputs: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = self.model(
            input_ids=ids[None],
            position_ids=self.positions(inputs, ids),
            attention_mask=mask,
            use_cache=False,
            **{name: inputs[name] for name in _PIXELS if name in inputs},
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def positions(self, inputs: Any, ids: torch.Tensor) -> torch.Tensor:
        """``[3, 1, length]`` M-RoPE positions. Each step, like each image, is a grid of its own at
        one temporal position, and its timestamp is ordinary text; what follows a grid starts one
        after its largest position. Source: Qwen3-VL's report, on text-based time alignment.
        """
        config = self.model.config
        merge = config.vision_config.spatial_merge_size
        steps = [(1, h, w) for t, h, w in inputs.get("video_grid_thw", ()) for _ in range(int(t))]
        grids = {
            config.image_token_id: iter(inputs.get("image_grid_thw", ())),
            config.video_token_id: iter(steps),
        }
        columns: list[torch.Tensor] = []
        at = start = 0
        while at < len(ids):
            if int(ids[at]) not in grids:
                columns.append(torch.full((3, 1), start))
                at, start = at + 1, start + 1
                continue
            _, h, w = next(grids[int(ids[at])])
            h, w = int(h) // merge, int(w) // merge
            rows, cells = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            columns.append(
                start + torch.stack([torch.zeros(h * w), rows.flatten(), cells.flatten()]).long()
            )
            at, start = at + h * w, start + max(h, w)
        return torch.cat(columns, dim=1)[:, None]
