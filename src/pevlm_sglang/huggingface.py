"""``attn_implementation="pevlm"`` for Hugging Face's models, to evaluate without a server.

    from pevlm_sglang.huggingface import pevlm_frames, register

    register()
    model = AutoModelForImageTextToText.from_pretrained(name, attn_implementation="pevlm")
    video = FrameSpans(steps)  # where each step's tokens lie in input_ids
    with pevlm_frames([video], sink_frames=16, block_frames=16):
        model.generate(**inputs)

The frames go by a context manager, since a model's call takes no argument for them. A vision tower,
which is not causal, keeps PyTorch's attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from pevlm_kernels import PrefillPlan, pevlm_prefill
from pevlm_sglang.attention.plan import build_plan, virtual_sequences
from pevlm_sglang.layout import FrameSpans, Layout

NAME = "pevlm"


def register() -> None:
    """Make the name known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


@dataclass
class Frames:
    """What the prompt of the models called now looks like.

    Attributes:
        layout: of the prompt.
        impl: of :func:`pevlm_kernels.pevlm_prefill`.
        sparse_calls: attention calls so far in which a token did not see everything before it.
    """

    layout: Layout
    impl: str
    sparse_calls: int = 0
    _plans: dict[tuple[int, int, torch.device], PrefillPlan] = field(default_factory=dict)

    def plan(self, prefix: int, length: int, device: torch.device) -> PrefillPlan:
        """The plan of a forward of the tokens ``[prefix, length)``, kept for its other layers."""
        key = (prefix, length, device)
        if key not in self._plans:
            # Token i of the prompt lies in row i of keys and values.
            rows = torch.arange(length, device=device)[None]
            sequences = virtual_sequences([self.layout], [prefix], [length - prefix])
            request = torch.zeros(1, dtype=torch.int64, device=device)
            self._plans = {key: build_plan(sequences, rows, request)}
        return self._plans[key]


_frames: ContextVar[Frames | None] = ContextVar("pevlm_frames", default=None)


@contextmanager
def pevlm_frames(
    videos: Sequence[FrameSpans], *, sink_frames: int, block_frames: int, impl: str = "auto"
) -> Iterator[Frames]:
    """Say where the frames of the prompt lie, for the forwards inside.

    Args:
        videos: in prompt order; none for a prompt of text.
        sink_frames, block_frames: see :meth:`pevlm_sglang.layout.Layout.build`.
        impl: see :func:`pevlm_kernels.pevlm_prefill`.

    Raises:
        ValueError: see :meth:`pevlm_sglang.layout.Layout.build`.
    """
    layout = Layout.build(videos, sink_frames=sink_frames, block_frames=block_frames)
    frames = Frames(layout, impl)
    token = _frames.set(frames)
    try:
        yield frames
    finally:
        _frames.reset(token)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for each layer.

    Args:
        module: the layer.
        query: ``[1, num_q_heads, extend, head_dim]``
        key, value: ``[1, num_kv_heads, prefix + extend, head_dim]``, the cache included.
        attention_mask: None; transformers makes none for this implementation.
        dropout: 0, as outside training.

    Returns:
        ``[1, extend, num_q_heads, head_dim]``, and no weights.

    Raises:
        RuntimeError: a call outside :func:`pevlm_frames`.
        ValueError: a batch, a mask, dropout or a sliding window, which PEVLM does not serve.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extend, length = query.shape[2], key.shape[2]
    decodes = extend == 1 and length > 1
    if causal:
        name, frames, problem = f"attn_implementation={NAME!r}", _frames.get(), None
        if frames is None:
            raise RuntimeError(
                f"{name}: expected a call inside `with pevlm_frames(videos, ...)`, with no videos "
                "for a prompt of text"
            )
        if query.shape[0] != 1:
            problem = f"a batch of 1, got {query.shape[0]}; the frames of one prompt are known"
        elif attention_mask is not None:
            shape = tuple(attention_mask.shape)
            problem = f"no attention_mask but the one of all ones, got shape {shape}"
        elif dropout:
            problem = f"no dropout, got {dropout}"
        elif sliding_window is not None and sliding_window < length:
            problem = f"full attention, got a sliding window of {sliding_window} tokens"
        if problem:
            raise ValueError(f"{name}: expected {problem}")
    if not causal or decodes:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=False,
            **kwargs,
        )
        return result
    assert frames is not None  # causal
    plan = frames.plan(length - extend, length, query.device)
    frames.sparse_calls += plan.num_seqs > 1
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    out = pevlm_prefill(q, k, v, plan, softmax_scale=scaling, impl=frames.impl)
    return out[None], None
