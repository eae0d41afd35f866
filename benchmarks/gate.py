"""No figure without a right answer: some rows of every output, against the definition in fp64."""

from __future__ import annotations

import torch
from workload import Prompt

NUM_RANDOM_ROWS = 8


def rows_to_check(prompt: Prompt) -> list[int]:
    """The rows where a wrong boundary shows, and some others."""
    edges = [0, prompt.sink_end - 1, prompt.sink_end, prompt.length - 1]
    for start, end in prompt.blocks[:1] + prompt.blocks[-1:]:
        edges += [start, end - 1, end]
    generator = torch.Generator().manual_seed(prompt.length)
    edges += torch.randint(prompt.length, (NUM_RANDOM_ROWS,), generator=generator).tolist()
    return sorted({row for row in edges if 0 <= row < prompt.length})


def worst_ratio(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: Prompt
) -> float:
    """The largest error over the checked rows, as a share of what it may be: twice that of plain
    operators in the same dtype, over the same rows. NaN counts as infinite."""
    error = rival = 0.0
    for row in rows_to_check(prompt):
        keys, values = (
            torch.cat([part[start:end] for start, end in prompt.keys_of(row)]) for part in (k, v)
        )
        exact = _attention(q[row], keys, values, torch.float64)
        plain = _attention(q[row], keys, values, q.dtype).double()
        found = out[row].double()
        if not found.isfinite().all():
            return float("inf")
        error = max(error, (found - exact).abs().max().item())
        rival = max(rival, (plain - exact).abs().max().item())
    return error / (2 * rival)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """One query, ``[num_q_heads, head_dim]``: each step's result rounded to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    group = q.shape[0] // k.shape[1]
    outputs = []
    for head in range(k.shape[1]):
        queries = q[head * group : (head + 1) * group].to(wide)
        scores = (queries @ k[:, head].to(wide).T).to(dtype) * q.shape[1] ** -0.5
        weights = scores.softmax(dim=-1)
        outputs.append((weights.to(wide) @ v[:, head].to(wide)).to(dtype))
    return torch.cat(outputs)
