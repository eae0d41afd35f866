"""Full attention, PEVLM, its ablations and its baselines, each as what one prompt needs of them.

A method turns a :class:`Prompt` (a text before the video, the video's steps, a text after it) into
a :class:`Recipe`: a dense mask, M-RoPE positions, and how the text after the video weighs the
context. One prefill with the recipe is then the method itself, computed without its savings.

What each is read from, and where the reading had to decide:

- ``pevlm``: the PEVLM paper, section 3. Sink: the text and the first frames; blocks of frames; the
  positions of full attention. ``sp=False`` reuses positions, ``df=False`` cuts sink and blocks by
  tokens, ``fs=False`` leaves the text alone in the sink. With none of the three it is APE at a
  temperature of 1, as in the paper (the first row of its table 3 is APE's figure in table 4).
- ``block_attention``: "Block-Attention for Efficient Prefilling" (2409.15355). Blocks of tokens see
  themselves alone, their keys are turned to their true positions afterwards, and the last block,
  the question, sees everything. RoPE is relative, so a block at positions from 0 on that is turned
  later is a block at its true positions. Not fine-tuned, as in the PEVLM paper.
- ``ape``: "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding"
  (2502.05431). The text before the video is the shared prefix; every block of tokens sees it and
  itself, and starts at the same position, right after the prefix; the question goes on after the
  largest position. The question's attention to the context has the temperature T, and the context's
  log-sum-exp is multiplied by S·T before it is weighed against the rest. T = S = 0.9 by default
  there; T = S = 1 is plain parallel encoding, what the PEVLM paper measured.
- ``star_attention``: "Star Attention: Efficient LLM Inference over Long Sequences" (2411.17116).
  The first block of tokens, prompt text included, is the anchor before each other block, which
  keeps its true positions; the anchor's copies are thrown away; the question sees everything.
  The copies equal the first block, for a token depends on those before it, so one node computes the
  same with a mask. ``reuse=True`` gives all blocks the positions of the second, which is what the
  PEVLM paper calls Star-Attention (its table 4 has both).

Token blocks of the baselines do not respect frames, as blocks of 4096 tokens do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

Range = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """One prompt with one video.

    Attributes:
        steps: half-open token ranges of the video's steps, in order and without gaps.
        positions: ``[3, length]`` int64, those of full attention.
    """

    steps: Sequence[Range]
    positions: torch.Tensor

    @property
    def start(self) -> int:
        return self.steps[0][0]

    @property
    def end(self) -> int:
        return self.steps[-1][1]

    @property
    def length(self) -> int:
        return self.positions.shape[1]


@dataclass(frozen=True)
class Recipe:
    """How to attend.

    Attributes:
        visible: ``[length, length]`` bool, which token ``q`` attends to which ``k``.
        positions: ``[3, length]`` int64.
        context: the tokens that APE weighs apart, for the queries behind them; empty elsewhere.
        temperature: T, which divides the scores of ``context``.
        lse_scale: S·T, which multiplies the log-sum-exp of ``context``.
    """

    visible: torch.Tensor
    positions: torch.Tensor
    context: Range = (0, 0)
    temperature: float = 1.0
    lse_scale: float = 1.0


Method = Callable[[Prompt], Recipe]


def full(prompt: Prompt) -> Recipe:
    """Causal attention."""
    return Recipe(_causal(prompt.length), prompt.positions)


def pevlm(
    *,
    sink_steps: int,
    block_steps: int,
    block_tokens: int,
    sink_tokens: int | None = None,
    sp: bool = True,
    df: bool = True,
    fs: bool = True,
) -> Method:
    """PEVLM, and what is left of it without a component.

    Args:
        sink_steps, block_steps: of the video, where it is cut by frames.
        block_tokens: of a block, where it is not.
        sink_tokens: of the video's share of the sink there; None is as many as of a block.
        sp: sequential positions; else every block reuses the first one's.
        df: divide by frame.
        fs: frames in the sink.
    """

    def method(prompt: Prompt) -> Recipe:
        steps = prompt.steps
        if df:
            sink_end = steps[min(sink_steps, len(steps)) - 1][1] if fs and sink_steps else None
            rest = [step for step in steps if sink_end is None or step[0] >= sink_end]
            blocks = [
                (rest[i][0], rest[i : i + block_steps][-1][1])
                for i in range(0, len(rest), block_steps)
            ]
        else:
            sink_end = min(prompt.start + (sink_tokens or block_tokens), prompt.end) if fs else None
            blocks = _cut(sink_end or prompt.start, prompt.end, block_tokens)
        recipe = _blocks(prompt, sink_end or prompt.start, blocks)
        return recipe if sp else _reused(prompt, recipe, blocks)

    return method


def block_attention(*, block_tokens: int) -> Method:
    """Blocks that see nothing but themselves; the first begins with the prompt."""

    def method(prompt: Prompt) -> Recipe:
        return _blocks(prompt, 0, _cut(0, prompt.end, block_tokens))

    return method


def ape(
    *,
    block_tokens: int,
    temperature: float = 1.0,
    scale: float | None = None,
    sequential: bool = False,
) -> Method:
    """Adaptive parallel encoding.

    Args:
        temperature: T.
        scale: S; None makes it T, as the method's authors do by default.
        sequential: keep the positions of full attention (the PEVLM paper's table 4).
    """
    scale = temperature if scale is None else scale

    def method(prompt: Prompt) -> Recipe:
        blocks = _cut(prompt.start, prompt.end, block_tokens)
        recipe = _blocks(prompt, prompt.start, blocks)
        if not sequential:
            recipe = _reused(prompt, recipe, blocks)
        return replace(
            recipe,
            context=(prompt.start, prompt.end),
            temperature=temperature,
            lse_scale=scale * temperature,
        )

    return method


def star_attention(*, block_tokens: int, reuse: bool = False) -> Method:
    """An anchor as large as a block, on one node."""

    def method(prompt: Prompt) -> Recipe:
        _, *blocks = _cut(0, prompt.end, block_tokens)
        recipe = _blocks(prompt, min(block_tokens, prompt.end), blocks)
        return _reused(prompt, recipe, blocks) if reuse else recipe

    return method


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recipe: Recipe, softmax_scale: float
) -> torch.Tensor:
    """Attention as the recipe has it.

    Args:
        q, k, v: ``[..., length, head_dim]``, rotated, as many key heads as query heads.

    Returns:
        ``[..., length, head_dim]``
    """
    return weights(q, k, recipe, softmax_scale).to(v.dtype) @ v


def weights(q: torch.Tensor, k: torch.Tensor, recipe: Recipe, softmax_scale: float) -> torch.Tensor:
    """``[..., length, length]`` fp32: what each query gives to each key; rows sum to one."""
    scores = (q @ k.transpose(-1, -2)).float() * softmax_scale
    scores = scores.masked_fill(~recipe.visible, float("-inf"))
    start, end = recipe.context
    if recipe.temperature != 1 or recipe.lse_scale != 1:
        context = scores[..., end:, start:end] / recipe.temperature
        lse = context.logsumexp(-1, keepdim=True)
        # exp(context - lse) sums to 1; it is given the weight exp(lse_scale * lse) as a whole.
        scores = scores.clone()
        scores[..., end:, start:end] = context - lse + recipe.lse_scale * lse
    return scores.softmax(-1)


def packed(recipe: Recipe, end: int, lengths: Sequence[int]) -> Recipe:
    """Several texts after one video in one pass: each sees what it would see alone.

    Args:
        recipe: of a prompt with the longest of the texts.
        end: of the video; what is before it does not depend on what is behind.
        lengths: tokens of the texts, which follow each other from ``end`` on.
    """
    size = end + sum(lengths)
    visible = torch.zeros(size, size, dtype=torch.bool)
    visible[:end, :end] = recipe.visible[:end, :end]
    start = end
    for n in lengths:
        visible[start : start + n, :end] = recipe.visible[end : end + n, :end]
        visible[start : start + n, start : start + n] = recipe.visible[end : end + n, end : end + n]
        start += n
    positions = [recipe.positions[:, :end]]
    positions += [recipe.positions[:, end : end + n] for n in lengths]
    return replace(recipe, visible=visible, positions=torch.cat(positions, 1))


def _cut(start: int, end: int, size: int) -> list[Range]:
    """Runs of ``size`` tokens; the last may be shorter."""
    return [(i, min(i + size, end)) for i in range(start, end, size)]


def _blocks(prompt: Prompt, sink_end: int, blocks: Sequence[Range]) -> Recipe:
    """A sink that is causal, blocks that see it and themselves, and text that sees everything."""
    visible = _causal(prompt.length)
    for start, end in blocks:
        visible[start:end, sink_end:start] = False
    return Recipe(visible, prompt.positions)


def _reused(prompt: Prompt, recipe: Recipe, blocks: Sequence[Range]) -> Recipe:
    """Every block takes the positions in time of the first, and the text after the video goes on
    behind the largest. Height and width say where in a frame, and stay."""
    positions = prompt.positions.clone()
    for start, end in blocks[1:]:
        back = prompt.positions[0, start] - prompt.positions[0, blocks[0][0]]
        positions[0, start:end] -= back
    after = int(positions[:, : prompt.end].max()) + 1
    positions[:, prompt.end :] = after + torch.arange(prompt.length - prompt.end)
    return replace(recipe, positions=positions)


def _causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()
