"""What the benchmarks compute: heads of released models, and prompts as the paper cuts them."""

from __future__ import annotations

from dataclasses import dataclass

SYSTEM_TOKENS = 64
QUESTION_TOKENS = 64
TOKENS_PER_FRAME = 256  # of a sampled frame: 16 frames are 4k tokens, as in the paper's example


@dataclass(frozen=True)
class Shape:
    """A language model's dimensions, from its released configuration."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    hidden_size: int
    intermediate_size: int


MODELS = {
    "Qwen2.5-VL-3B": Shape(16, 2, 128, 36, 2048, 11008),
    "Qwen2.5-VL-7B": Shape(28, 4, 128, 28, 3584, 18944),
    "Qwen2.5-VL-32B": Shape(40, 8, 128, 64, 5120, 27648),
    "Qwen2.5-VL-72B": Shape(64, 8, 128, 80, 8192, 29568),
    "Qwen3-VL-8B": Shape(32, 8, 128, 36, 4096, 12288),  # InternVL3.5-8B has the same heads
    "Qwen3-VL-32B": Shape(64, 8, 128, 64, 5120, 25600),
    "InternVL3.5-14B": Shape(40, 8, 128, 40, 5120, 17408),
    "InternVL3.5-30B-A3B": Shape(32, 4, 128, 48, 2048, 6144),
    "tiny": Shape(4, 2, 64, 4, 256, 512),
}


@dataclass(frozen=True)
class Prompt:
    """A system prompt, a video, a question.

    Attributes:
        length: tokens.
        sink_end: tokens of the system prompt and the sink frames.
        blocks: token ranges; none is full attention.
    """

    length: int
    sink_end: int
    blocks: tuple[tuple[int, int], ...]

    @classmethod
    def of_video(
        cls, length: int, sink_frames: int, block_frames: int, tokens_per_frame: int
    ) -> Prompt:
        """Whole frames as far as they go; the last block takes what is left before the question."""
        video_end = length - QUESTION_TOKENS
        sink_end = min(SYSTEM_TOKENS + sink_frames * tokens_per_frame, video_end)
        size = block_frames * tokens_per_frame
        starts = range(sink_end, video_end, size)
        blocks = tuple((start, min(start + size, video_end)) for start in starts)
        return cls(length, sink_end, blocks)

    @property
    def pairs(self) -> int:
        """Attended (query, key) pairs."""
        hidden = sum((end - start) * (start - self.sink_end) for start, end in self.blocks)
        return self.length * (self.length + 1) // 2 - hidden

    @property
    def visible_fraction(self) -> float:
        return self.pairs / (self.length * (self.length + 1) // 2)

    def keys_of(self, query: int) -> list[tuple[int, int]]:
        """The ranges of keys that a query sees, from the definition."""
        for start, end in self.blocks:
            if start <= query < end:
                return [(0, self.sink_end), (start, query + 1)]
        return [(0, query + 1)]

    def full(self) -> Prompt:
        """The same tokens under full attention."""
        return Prompt(self.length, self.sink_end, ())


def flops(prompt: Prompt, shape: Shape) -> int:
    """Of one layer's attention, the useful ones: two products of 2 a pair, head and width."""
    return 4 * prompt.pairs * shape.num_q_heads * shape.head_dim
