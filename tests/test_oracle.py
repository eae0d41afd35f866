"""Who attends to whom, token by token, as the specification words it. Slow, and shares no code with
``layout.py``: the other tests compare against it. Its own tests check it against masks by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from pevlm_sglang.layout import FrameSpans

GLOBAL = "GLOBAL"


@dataclass(frozen=True)
class Prompt:
    """A prompt in two forms.

    Attributes:
        tags: a token each: None for text, (video, step) inside a video. What the oracle reads.
        videos: the same as ranges. What the code under test reads.
    """

    tags: tuple[tuple[int, int] | None, ...]
    videos: tuple[FrameSpans, ...]

    def __len__(self) -> int:
        return len(self.tags)


@dataclass(frozen=True)
class Video:
    """How to write a video into a prompt: tokens of each step, and of the gaps of an image run."""

    lengths: tuple[int, ...]
    frames_per_step: int = 1
    gaps: tuple[int, ...] | None = None


def write(*parts: int | Video) -> Prompt:
    """A prompt of text (a number of tokens) and videos."""
    tags: list[tuple[int, int] | None] = []
    videos: list[FrameSpans] = []
    for part in parts:
        if isinstance(part, int):
            tags += [None] * part
            continue
        steps = []
        for step, length in enumerate(part.lengths):
            if part.gaps is not None and step:
                tags += [None] * part.gaps[step - 1]
            steps.append((len(tags), len(tags) + length))
            tags += [(len(videos), step)] * length
        videos.append(FrameSpans(tuple(steps), part.frames_per_step, part.gaps is not None))
    return Prompt(tuple(tags), tuple(videos))


def classes(prompt: Prompt, sink_frames: int, block_frames: int) -> list[object]:
    """GLOBAL or (video, block), a token."""
    labels: list[object] = []
    for tag in prompt.tags:
        if tag is None:
            labels.append(GLOBAL)
            continue
        video, step = tag
        sink = _whole_steps(sink_frames, prompt.videos[video].frames_per_step)
        block = _whole_steps(block_frames, prompt.videos[video].frames_per_step)
        labels.append(GLOBAL if step < sink else (video, (step - sink) // block))
    return labels


def visible_keys(
    prompt: Prompt, sink_frames: int, block_frames: int, generated: int = 0
) -> list[set[int]]:
    """The keys that each token attends to; generated tokens follow the prompt."""
    labels = classes(prompt, sink_frames, block_frames) + [GLOBAL] * generated
    rows = []
    for q, label in enumerate(labels):
        if label == GLOBAL:  # rule 1
            rows.append(set(range(q + 1)))
            continue
        video, block = label
        sink_end = _sink_end(prompt, labels, video)
        previous = [k for k, other in enumerate(labels) if other == (video, block - 1)]
        extent_start = previous[-1] + 1 if previous else sink_end
        row = {k for k in range(sink_end) if labels[k] == GLOBAL}  # rule 2
        row |= set(range(extent_start, q + 1))  # rule 3
        rows.append({k for k in row if k <= q})
    return rows


def _sink_end(prompt: Prompt, labels: list[object], video: int) -> int:
    """The end of the last sink step; with no sink step, where the video starts."""
    own = [k for k, tag in enumerate(prompt.tags) if tag is not None and tag[0] == video]
    in_sink = [k for k in own if labels[k] == GLOBAL]
    return in_sink[-1] + 1 if in_sink else own[0]


def _whole_steps(frames: int, frames_per_step: int) -> int:
    """Rounded up, by counting."""
    steps = 0
    while steps * frames_per_step < frames:
        steps += 1
    return steps


@st.composite
def prompts(draw: st.DrawFn, min_videos: int = 0, max_videos: int = 3) -> Prompt:
    """Videos with steps of uneven length and image runs with text in their gaps, text around."""
    parts: list[int | Video] = []
    for _ in range(draw(st.integers(min_videos, max_videos))):
        parts.append(draw(st.integers(0, 5)))
        lengths = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=9)))
        if draw(st.booleans()):
            gaps = draw(
                st.lists(st.integers(0, 3), min_size=len(lengths) - 1, max_size=len(lengths) - 1)
            )
            parts.append(Video(lengths, gaps=tuple(gaps)))
        else:
            parts.append(Video(lengths, frames_per_step=draw(st.sampled_from((1, 2)))))
    parts.append(draw(st.integers(0, 6)))
    return write(*parts)


sinks = st.integers(0, 6)
blocks = st.integers(1, 6)


def picture(rows: list[set[int]]) -> list[str]:
    return ["".join("x" if k in row else "." for k in range(q + 1)) for q, row in enumerate(rows)]


def test_one_video_by_hand() -> None:
    # Text, sink, two blocks of a step with two tokens each, question: equations (2)-(4).
    prompt = write(1, Video((1, 2, 2)), 1)
    assert classes(prompt, 1, 1) == [GLOBAL, GLOBAL, (0, 0), (0, 0), (0, 1), (0, 1), GLOBAL]
    assert picture(visible_keys(prompt, 1, 1)) == [
        "x",
        "xx",
        "xxx",
        "xxxx",
        "xx..x",
        "xx..xx",
        "xxxxxxx",
    ]


def test_second_video_sees_no_block_of_the_first() -> None:
    prompt = write(Video((1, 1, 1)), 1, Video((1, 1, 1)))
    assert picture(visible_keys(prompt, 1, 1, generated=1)) == [
        "x",
        "xx",
        "x.x",
        "xxxx",
        "xxxxx",
        "x..xxx",
        "x..xx.x",
        "xxxxxxxx",
    ]


def test_gap_text_of_an_image_run_is_global_and_in_the_extent() -> None:
    prompt = write(Video((1, 1, 1, 1), gaps=(1, 0, 1)))
    assert classes(prompt, 1, 1) == [GLOBAL, GLOBAL, (0, 0), (0, 1), GLOBAL, (0, 2)]
    assert picture(visible_keys(prompt, 1, 1)) == ["x", "xx", "xxx", "x..x", "xxxxx", "x...xx"]


def test_frames_round_up_to_whole_steps() -> None:
    prompt = write(Video((1,) * 6, frames_per_step=2))
    two_steps_and_one = classes(prompt, 4, 2)
    assert two_steps_and_one == [GLOBAL, GLOBAL, (0, 0), (0, 1), (0, 2), (0, 3)]
    assert classes(prompt, 3, 1) == two_steps_and_one


def test_no_sink_step_leaves_the_text_before_the_video() -> None:
    prompt = write(1, Video((1, 1)))
    assert picture(visible_keys(prompt, 0, 1)) == ["x", "xx", "x.x"]
