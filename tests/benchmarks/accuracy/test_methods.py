"""Each method's mask and positions against its own paper, followed step by step with KV caches.

The model is a toy: two layers of rotary attention, whose keys are cached unrotated with their
positions, so that a paper's "encode apart, then turn to the true position" can be done literally.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from accuracy import methods
from accuracy.methods import Prompt, Range

DIM = 16
TEXT, STEPS, STEP, QUESTION = 5, 7, 4, 6
END = TEXT + STEPS * STEP
LENGTH = END + QUESTION


def make_prompt() -> Prompt:
    """Five text tokens, seven steps of 2 x 2 tokens two positions apart, six text tokens."""
    before = torch.arange(TEXT).expand(3, -1)
    t, h, w = torch.meshgrid(
        2 * torch.arange(STEPS), torch.arange(2), torch.arange(2), indexing="ij"
    )
    video = torch.stack([t, h, w]).reshape(3, -1) + TEXT
    after = (int(video.max()) + 1 + torch.arange(QUESTION)).expand(3, -1)
    steps = [(TEXT + STEP * i, TEXT + STEP * (i + 1)) for i in range(STEPS)]
    return Prompt(steps, torch.cat([before, video, after], 1))


@dataclass
class Cache:
    """Unrotated keys and values of tokens, a pair a layer, and the tokens' positions."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    positions: torch.Tensor

    def part(self, start: int, end: int) -> Cache:
        layers = [(k[start:end], v[start:end]) for k, v in self.layers]
        return Cache(layers, self.positions[:, start:end])


def join(*caches: Cache) -> Cache:
    layers = [
        (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
        for pairs in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return Cache(layers, torch.cat([cache.positions for cache in caches], 1))


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Three quarters of the angles follow time, one height."""
    inverse = 100.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
    axis = torch.tensor([0] * 6 + [1] * 2)
    angles = positions[axis].T * inverse
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Toy:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = [
            [torch.randn(DIM, DIM, generator=generator).double() * 0.5 for _ in range(3)]
            for _ in range(2)
        ]
        self.x = torch.randn(LENGTH, DIM, generator=generator).double()

    def all_at_once(self, recipe: methods.Recipe) -> torch.Tensor:
        x = self.x
        for wq, wk, wv in self.layers:
            q, k = (rotate(x @ w, recipe.positions) for w in (wq, wk))
            x = x + methods.attention(q, k, x @ wv, recipe, DIM**-0.5)
        return x

    def encode(
        self,
        tokens: Range,
        positions: torch.Tensor,
        past: Cache | None = None,
        context: Range = (0, 0),
        temperature: float = 1.0,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, Cache]:
        """Run tokens after a cache, causal among themselves; returns them and their own cache.

        The part ``context`` of the cache is attended to as in APE: apart, at a temperature, and
        merged with the rest by its log-sum-exp times scale and temperature.
        """
        x = self.x[slice(*tokens)]
        n = len(x)
        layers = []
        for i, (wq, wk, wv) in enumerate(self.layers):
            q, k, v = rotate(x @ wq, positions), x @ wk, x @ wv
            layers.append((k, v))
            keys, values, where = k, v, positions
            if past is not None:
                keys = torch.cat([past.layers[i][0], k])
                values = torch.cat([past.layers[i][1], v])
                where = torch.cat([past.positions, positions], 1)
            scores = q @ rotate(keys, where).T / DIM**0.5
            old = len(keys) - n
            scores[:, old:] += torch.full((n, n), float("-inf")).triu(1)
            inside = torch.zeros(len(keys), dtype=torch.bool)
            inside[slice(*context)] = True
            parts = [(scores[:, ~inside], values[~inside], 1.0)]
            if inside.any():
                parts.append((scores[:, inside] / temperature, values[inside], scale * temperature))
            outs = torch.stack([s.softmax(-1) @ u for s, u, _ in parts])
            weights = torch.stack([s.logsumexp(-1) * f for s, _, f in parts]).softmax(0)
            x = x + (weights[..., None] * outs).sum(0)
        return x, Cache(layers, positions)


@pytest.fixture(name="toy")
def _toy() -> Toy:
    return Toy()


PROMPT = make_prompt()
P = PROMPT.positions


def question_positions(caches: Cache) -> torch.Tensor:
    """Behind the largest that was used."""
    return (int(caches.positions.max()) + 1 + torch.arange(QUESTION)).expand(3, -1)


def same(toy: Toy, method: methods.Method, expected: torch.Tensor) -> None:
    actual = toy.all_at_once(method(PROMPT))[END:]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)  # scores are in fp32


def test_full_attention_is_one_causal_pass(toy: Toy) -> None:
    expected, _ = toy.encode((0, LENGTH), P)
    same(toy, methods.full, expected[END:])


def test_pevlm_encodes_blocks_of_frames_after_the_sink(toy: Toy) -> None:
    sink_end = TEXT + 2 * STEP
    _, sink = toy.encode((0, sink_end), P[:, :sink_end])
    caches = [sink]
    for start in range(sink_end, END, 3 * STEP):
        end = min(start + 3 * STEP, END)
        caches.append(toy.encode((start, end), P[:, start:end], sink)[1])
    expected, _ = toy.encode((END, LENGTH), P[:, END:], join(*caches))
    same(toy, methods.pevlm(sink_steps=2, block_steps=3, block_tokens=10), expected)


def test_block_attention_encodes_from_zero_and_turns_the_keys_back(toy: Toy) -> None:
    caches = []
    for start in range(0, END, 10):
        end = min(start + 10, END)
        apart = P[:, start:end] - P[:, start:end].min()
        _, cache = toy.encode((start, end), apart)
        caches.append(Cache(cache.layers, P[:, start:end]))
    expected, _ = toy.encode((END, LENGTH), P[:, END:], join(*caches))
    same(toy, methods.block_attention(block_tokens=10), expected)


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.9, 0.9), (0.5, 0.8)])
def test_ape_shares_prefix_and_positions_and_weighs_the_context(
    toy: Toy, temperature: float, scale: float
) -> None:
    _, prefix = toy.encode((0, TEXT), P[:, :TEXT])
    caches = [prefix]
    for start in range(TEXT, END, 10):
        end = min(start + 10, END)
        reused = P[:, start:end].clone()
        reused[0] += TEXT - reused[0, 0]
        caches.append(toy.encode((start, end), reused, prefix)[1])
    past = join(*caches)
    expected, _ = toy.encode(
        (END, LENGTH), question_positions(past), past, (TEXT, END), temperature, scale
    )
    same(toy, methods.ape(block_tokens=10, temperature=temperature, scale=scale), expected)


def test_ape_scales_by_its_temperature_unless_told_otherwise() -> None:
    recipe = methods.ape(block_tokens=10, temperature=0.9)(PROMPT)
    assert recipe.lse_scale == pytest.approx(0.81)
    assert methods.ape(block_tokens=10)(PROMPT).lse_scale == 1


def test_star_attention_puts_a_copy_of_the_first_block_before_each(toy: Toy) -> None:
    _, anchor = toy.encode((0, 10), P[:, :10])
    caches = [anchor]
    for start in range(10, END, 10):
        end = min(start + 10, END)
        # The anchor's tokens are encoded again with the block, and their cache thrown away.
        copy = Toy()
        copy.x = torch.cat([toy.x[:10], toy.x[start:end]])
        where = torch.cat([P[:, :10], P[:, start:end]], 1)
        _, cache = copy.encode((0, 10 + end - start), where)
        caches.append(cache.part(10, 10 + end - start))
    expected, _ = toy.encode((END, LENGTH), P[:, END:], join(*caches))
    same(toy, methods.star_attention(block_tokens=10), expected)


def test_pevlm_with_reused_positions(toy: Toy) -> None:
    sink_end = TEXT + 2 * STEP
    _, sink = toy.encode((0, sink_end), P[:, :sink_end])
    caches = [sink]
    for start in range(sink_end, END, 2 * STEP):
        end = min(start + 2 * STEP, END)
        reused = P[:, sink_end : sink_end + end - start]
        caches.append(toy.encode((start, end), reused, sink)[1])
    past = join(*caches)
    expected, _ = toy.encode((END, LENGTH), question_positions(past), past)
    same(toy, methods.pevlm(sink_steps=2, block_steps=2, block_tokens=8, sp=False), expected)


def test_star_attention_with_reused_positions(toy: Toy) -> None:
    _, anchor = toy.encode((0, 10), P[:, :10])
    caches = [anchor]
    for start in range(10, END, 10):
        end = min(start + 10, END)
        reused = P[:, start:end].clone()
        reused[0] += P[0, 10] - reused[0, 0]
        caches.append(toy.encode((start, end), reused, anchor)[1])
    past = join(*caches)
    expected, _ = toy.encode((END, LENGTH), question_positions(past), past)
    same(toy, methods.star_attention(block_tokens=10, reuse=True), expected)


def test_without_any_component_pevlm_is_plain_parallel_encoding() -> None:
    nothing = methods.pevlm(
        sink_steps=2, block_steps=3, block_tokens=10, sp=False, df=False, fs=False
    )(PROMPT)
    plain = methods.ape(block_tokens=10)(PROMPT)
    assert torch.equal(nothing.visible, plain.visible)
    assert torch.equal(nothing.positions, plain.positions)


def test_each_component_changes_what_it_names() -> None:
    sizes = {"sink_steps": 2, "block_steps": 2, "block_tokens": 11}
    whole = methods.pevlm(**sizes)(PROMPT)
    no_sp, no_df, no_fs = (
        methods.pevlm(**sizes, **{name: False})(PROMPT) for name in ("sp", "df", "fs")
    )
    assert torch.equal(no_sp.visible, whole.visible)
    assert not torch.equal(no_sp.positions, whole.positions)
    for recipe in (no_df, no_fs):
        assert torch.equal(recipe.positions, whole.positions)
        assert not torch.equal(recipe.visible, whole.visible)
    # Without DF a cut falls inside a step; with it, tokens of a step see the same blocks.
    frame = slice(TEXT + 5 * STEP, TEXT + 6 * STEP)
    assert len({tuple(row.tolist()) for row in whole.visible[frame, : frame.start]}) == 1
    assert len({tuple(row.tolist()) for row in no_df.visible[frame, : frame.start]}) == 2
    # Without FS a block sees the text, and no frame of another block.
    last = no_fs.visible[END - 1]
    assert last[:TEXT].all()
    assert not last[TEXT : END - STEP].any()


def test_few_frames_are_full_attention() -> None:
    recipe = methods.pevlm(sink_steps=4, block_steps=4, block_tokens=16)(PROMPT)
    assert torch.equal(recipe.visible, methods.full(PROMPT).visible)


def test_pevlm_has_the_mask_of_the_layout() -> None:
    from pevlm_sglang.layout import FrameSpans, Layout

    recipe = methods.pevlm(sink_steps=1, block_steps=2, block_tokens=8)(PROMPT)
    spans = FrameSpans(tuple(PROMPT.steps), frames_per_step=2)
    layout = Layout.build([spans], sink_frames=2, block_frames=4)
    expected = [[layout.visible(q, k) for k in range(LENGTH)] for q in range(LENGTH)]
    assert torch.equal(recipe.visible, torch.tensor(expected))
