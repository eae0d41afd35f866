"""Vision attention segment by segment.

``VisionSdpaAttention`` (sglang/srt/layers/attention/vision.py), the only vision attention that runs
without a GPU, builds an ``s x s`` mask over all patches of all videos of a forward and runs dense
attention under it: 64k patches make a mask of 4 GB. The mask is block-diagonal, so each block can
run alone, with the same result and no mask.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def segmented_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    boundaries: list[int],
    *,
    scale: float,
) -> torch.Tensor:
    """Non-causal attention inside each segment ``[boundaries[i], boundaries[i + 1])``.

    Args:
        q: ``[s, num_heads, head_dim]``; k, v: ``[s, num_kv_heads, head_dim]``.
        boundaries: cumulative lengths, from 0 to s.

    Returns:
        ``[s, num_heads, head_dim]``
    """
    out = torch.empty_like(q)
    gqa = q.shape[1] != k.shape[1]
    for start, end in pairwise(boundaries):
        qs, ks, vs = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        o = scaled_dot_product_attention(qs, ks, vs, scale=scale, enable_gqa=gqa)
        out[start:end] = o.squeeze(0).transpose(0, 1)
    return out


def install_segmented_vision_attention() -> None:
    """Replace ``VisionSdpaAttention.forward`` where its mask is block-diagonal."""
    from sglang.srt.layers.attention.vision import VisionSdpaAttention

    dense_forward = VisionSdpaAttention.forward

    def forward(
        self: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bsz: int,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        segmented = (
            self.flatten_batch
            and cu_seqlens is not None
            and attention_mask is None
            and not self.softmax_in_single_precision
        )
        if not segmented:
            return dense_forward(self, q, k, v, bsz, cu_seqlens, attention_mask, **kwargs)
        assert cu_seqlens is not None
        shape = (-1, self.num_heads, self.head_size)
        kv_shape = (-1, self.num_kv_heads, self.head_size)
        return segmented_attention(
            q.reshape(shape),
            k.reshape(kv_shape),
            v.reshape(kv_shape),
            cu_seqlens.tolist(),
            scale=self.scale,
        )

    VisionSdpaAttention.forward = forward
