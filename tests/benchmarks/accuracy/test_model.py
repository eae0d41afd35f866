"""The small model's videos, questions, files, and the training forward against Hugging Face's."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import fast, model, questions, recipe, videos
from accuracy.dataset import HELD_OUT_SCENES
from accuracy.model import AFTER
from accuracy.train import scenes_of_step
from accuracy.trainer import ANSWER, SLOT


@pytest.fixture(name="directory", scope="module")
def _directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    model.write_tokenizer(directory)
    model.write_processor(directory)
    return directory


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(name="small", scope="module")
def _small(tokenizer: Any) -> Any:
    small = model.make_model(tokenizer.get_vocab(), seed=0).eval()
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return small


def world(seed: int, scenes: int = 24) -> videos.World:
    return videos.make_world(np.random.default_rng(seed), scenes)


def test_every_word_is_one_token(tokenizer: Any) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        for task in questions.TASKS:
            question = questions.ask(rng, world(seed, 4 + seed), task)
            if question is None:
                continue
            asked = tokenizer.encode(AFTER.format(question=question.text))
            answer = tokenizer.encode(f"{question.answer}<|im_end|>")
            assert len(answer) <= ANSWER
            assert len(asked) + len(answer) - 1 <= SLOT
            assert len(answer) == 2 + (task == "code")
            assert tokenizer.decode(asked) == AFTER.format(question=question.text)


def test_answers_follow_from_the_scenes() -> None:
    """Each answer found again by a plain walk through the scenes."""
    for seed in range(60):
        w = world(seed, 30)
        rng = np.random.default_rng(seed)
        names = [*videos.SHAPES, "code"]
        scenes = [
            (names[s], [*videos.COLOURS][c], videos.PLACES[p])
            for s, c, p in zip(w.shapes, w.colours, w.places, strict=True)
        ]
        shown = [shape for shape, _, _ in scenes]
        for task in questions.TASKS:
            question = questions.ask(rng, w, task)
            if question is None:
                continue
            words = question.text.rstrip("?").split()
            pick = 1 if words[0] == "Colour" else 2
            if task == "code":
                expected = f"{w.code[0]}{w.code[1]}"
            elif task == "time":
                expected = scenes[len(scenes) - 1 - questions.NUMBERS.index(words[1])][pick]
            elif task == "order":
                expected = min(words[0], words[2], key=shown.index)
            elif task == "count":
                expected = str(shown.count(words[2]))
            elif task == "cross":
                expected = scenes[shown.index(words[2]) - 1][pick]
            elif task == "find":
                assert shown.count(words[2]) == 1
                expected = scenes[shown.index(words[2])][pick]
            else:
                at = [i for i, shape in enumerate(shown) if shape == words[3]]
                assert len(at) > 1
                expected = scenes[at[0] if words[2] == "first" else at[-1]][pick]
            assert question.answer == expected, question


@pytest.mark.parametrize("task", ["order", "count", "cross", "occurrence", "time", "find"])
def test_answers_are_balanced(task: str) -> None:
    rng = np.random.default_rng(0)
    found = [questions.ask(rng, world(seed, 32), task) for seed in range(1200)]
    answers = [q.answer for q in found if q]
    for kind in (videos.COLOURS, videos.PLACES, videos.EVENTS, "0123"):
        counts = Counter(answer for answer in answers if answer in kind)
        assert not counts or max(counts.values()) < 2 * min(counts.values()), counts


def test_held_out_lengths_are_not_trained_on() -> None:
    rng = np.random.default_rng(0)
    for phase in recipe.PHASES:
        shortest, longest = phase.scenes
        drawn = {scenes_of_step(rng, phase) for _ in range(2000)}
        assert drawn == set(range(shortest, longest + 1)) - set(HELD_OUT_SCENES)


def test_the_recipe_is_in_order() -> None:
    """Phases follow each other, weigh every task, and rates rise and fall where they say."""
    for before, phase in pairwise(recipe.PHASES):
        assert before.until <= phase.first < phase.until
    for phase in recipe.PHASES:
        assert len(phase.weights) == len(questions.TASKS)
        assert sum(phase.weights) == pytest.approx(1)
        assert phase.rate(phase.first) <= 0.02
        assert recipe.phase_of(phase.until - 1) is phase
    last = recipe.PHASES[-1]
    assert recipe.phase_of(last.until) is None
    middle = (last.first + last.until) // 2
    assert last.rate(middle) == pytest.approx(0.5, abs=0.01)
    assert last.rate(last.until - 1) == 0.02


def test_patches_are_the_processors(directory: Path) -> None:
    from transformers import AutoProcessor

    frames = videos.render_world(world(3, 6), seed=1)
    inputs = AutoProcessor.from_pretrained(directory)(
        text=["<|vision_start|><|video_pad|><|vision_end|>"],
        videos=[frames],
        video_metadata=[
            {"fps": 2.0, "total_num_frames": len(frames), "frames_indices": [*range(len(frames))]}
        ],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert inputs["video_grid_thw"].tolist() == [[6, 4, 4]]
    assert inputs["second_per_grid_ts"].tolist() == [1.0]
    mine = model.patches(frames.float().unflatten(0, (-1, 2)))
    torch.testing.assert_close(mine, inputs["pixel_values_videos"])


def test_fast_vision_is_hugging_faces(small: Any) -> None:
    frames = videos.render_world(world(3, 6), seed=1).float().unflatten(0, (-1, 2))
    visual = small.model.visual
    with torch.no_grad():
        expected = visual(model.patches(frames), torch.tensor([[6, 4, 4]])).pooler_output
        mine = fast.vision(visual, model.patches(frames), *fast.vision_rotation(visual))
    torch.testing.assert_close(mine.flatten(0, 1), expected, rtol=0, atol=1e-5)


def test_fast_language_answers_each_question_as_if_it_stood_alone(small: Any) -> None:
    language = small.model.language_model
    before, steps, slots = 7, 5, 3
    video, after = model.video_positions(before, steps)
    text = (torch.arange(SLOT) + after).repeat(slots).expand(3, -1)
    positions = torch.cat([torch.arange(before).expand(3, -1), video, text], 1)
    prompt = before + steps * model.STEP_TOKENS
    x = torch.randn(
        2, prompt + slots * SLOT, small.config.text_config.hidden_size,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with torch.no_grad():
        mine, _ = fast.language(language, x, *fast.rotation(language, positions), prompt, SLOT)
        for slot in range(slots):
            own = prompt + slot * SLOT + torch.arange(SLOT)
            index = torch.cat([torch.arange(prompt), own])
            expected = language(
                inputs_embeds=x[:, index],
                position_ids=positions[:, None, index].expand(3, 2, -1),
                use_cache=False,
            ).last_hidden_state
            torch.testing.assert_close(mine[:, index], expected, rtol=0, atol=2e-5)


def test_text_goes_on_behind_the_videos_largest_position() -> None:
    positions, after = model.video_positions(15, 32)
    assert positions[0].max() == 15 + 62
    assert after == 78
    assert positions[1:].max() == 16


def test_each_picture_and_its_labels() -> None:
    labels = videos.quarter_labels()
    assert len(labels) == len(videos.pictures()) == 340
    w = world(0, 24)
    for scene, picture in enumerate(videos.picture_ids(w)):
        shown = labels[picture]
        if w.shapes[scene] == videos.CODE:
            assert shown[:2, 0].tolist() == [len(videos.SHAPES) + d for d in w.code]
        else:
            assert shown[w.places[scene]].tolist() == [w.shapes[scene], w.colours[scene]]
            assert (shown[:, 0] == len(videos.SHAPES) + 10).sum() == 3


def test_a_video_survives_its_encoding(tmp_path: Path) -> None:
    from torchcodec.decoders import VideoDecoder

    frames = videos.render_world(world(5, 8), seed=2)
    path = videos.write_mp4(tmp_path / "video.mp4", frames)
    decoded = VideoDecoder(str(path)).get_frames_in_range(0, len(frames)).data
    assert decoded.shape == frames.shape
    assert (decoded.float() - frames.float()).abs().mean() < 8
