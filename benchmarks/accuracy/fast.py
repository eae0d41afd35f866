"""Hugging Face's Qwen2.5-VL, forward only, arranged for training on a CPU.

The arithmetic is that of the modules whose weights are used, in full attention; what differs is
the arrangement. Frames of one size go through the vision tower as one batch of steps. Several
questions about one video share its tokens: the sequence is the video's prompt, then one slot a
question; a slot attends to the prompt and to itself, at the positions that it would have if it
stood there alone. ``tests/benchmarks/accuracy/test_model.py`` compares both with
Hugging Face's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

PATCHES = 16  # of a step
EPSILON = 1e-6  # of the norms


def vision_rotation(visual: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, ``[PATCHES, head_dim]``, of the patches of a step in their order."""
    row = torch.tensor([[0, 0, 1, 1] * 2, [2, 2, 3, 3] * 2]).reshape(2, 2, 4).reshape(-1)
    column = torch.tensor([[0, 1, 0, 1, 2, 3, 2, 3]] * 2).reshape(-1)
    config = visual.config
    quarter = config.hidden_size // config.num_heads // 2
    inverse = 1.0 / (10000.0 ** (torch.arange(0, quarter, 2).float() / quarter))
    angles = torch.cat([row[:, None] * inverse, column[:, None] * inverse], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def vision(visual: Any, patches: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """``[steps, 4, hidden]`` features of ``[steps * PATCHES, values]`` patches."""
    embed = visual.patch_embed.proj.weight
    x = F.linear(patches, embed.reshape(len(embed), -1)).unflatten(0, (-1, PATCHES))
    heads = visual.config.num_heads
    for block in visual.blocks:
        h = _norm(x, block.norm1.weight)
        q, k, v = block.attn.qkv(h).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + block.attn.proj(a.transpose(1, 2).flatten(2))
        x = x + block.mlp(_norm(x, block.norm2.weight))
    merged = _norm(x, visual.merger.ln_q.weight).unflatten(1, (4, 4)).flatten(2)
    return visual.merger.mlp(merged)


def language(
    model: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prompt: int, slot: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after the last norm, and those after the first layer.

    Args:
        model: the language model.
        x: ``[batch, prompt + slots * slot, hidden]`` embeddings.
        cos, sin: ``[length, head_dim]``, of the positions.
        prompt: tokens that the slots share.
        slot: tokens of a question and its answer, padded.
    """
    causal, inside = (torch.ones(n, n, dtype=torch.bool).triu(1) for n in (prompt, slot))
    first = x
    for number, layer in enumerate(model.layers):
        a, mlp = layer.self_attn, layer.mlp
        h = _norm(x, layer.input_layernorm.weight)
        q, k, v = (
            F.linear(h, p.weight, p.bias).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
            for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (t.repeat_interleave(a.num_key_value_groups, 1) for t in (k, v))
        q, k_prompt, v_prompt = q * a.scaling, k[:, :, :prompt], v[:, :, :prompt]
        shared = _softmax(q[:, :, :prompt] @ k_prompt.transpose(-1, -2), causal) @ v_prompt
        qs, ks, vs = (t[:, :, prompt:].unflatten(2, (-1, slot)) for t in (q, k, v))
        to_prompt = (q[:, :, prompt:] @ k_prompt.transpose(-1, -2)).unflatten(2, (-1, slot))
        to_prompt, to_slot = _softmax_of_two(to_prompt, qs @ ks.transpose(-1, -2), inside)
        asked = to_prompt.flatten(2, 3) @ v_prompt + (to_slot @ vs).flatten(2, 3)
        x = x + a.o_proj(torch.cat([shared, asked], 2).transpose(1, 2).flatten(2))
        h = _norm(x, layer.post_attention_layernorm.weight)
        x = x + mlp.down_proj(_gated(mlp.gate_proj(h), mlp.up_proj(h)))
        first = x if number == 0 else first
    return _norm(x, model.norm.weight), first


def compile_small_pieces() -> None:
    """Fuse what is neither a product nor attention: on a CPU it takes most of the time."""
    for name in ("_norm", "_rotate", "_gated", "_softmax", "_softmax_of_two"):
        globals()[name] = torch.compile(globals()[name], dynamic=True)


def rotation(model: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, ``[length, head_dim]``, of ``[3, length]`` M-RoPE positions."""
    cos, sin = model.rotary_emb(torch.empty(0), positions[:, None])
    return cos[0], sin[0]


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPSILON)
    return (weight * y).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    y = x.float()
    first, second = y.chunk(2, -1)
    return (y * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _softmax(scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return scores.float().masked_fill(hidden, float("-inf")).softmax(-1).to(scores.dtype)


def _softmax_of_two(
    to_prompt: torch.Tensor, to_slot: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the keys of both."""
    a, b = to_prompt.float(), to_slot.float().masked_fill(hidden, float("-inf"))
    top = torch.maximum(a.amax(-1, True), b.amax(-1, True)).detach()
    a, b = (a - top).exp(), (b - top).exp()
    total = a.sum(-1, True) + b.sum(-1, True)
    return (a / total).to(to_prompt.dtype), (b / total).to(to_slot.dtype)
