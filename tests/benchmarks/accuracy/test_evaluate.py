"""The evaluation loop: its attention is Hugging Face's where nothing is hidden, questions in one
pass are answered as if alone, and the sweep's masks are those that the server computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import answers, attention_scores, evaluate, methods, reader, sweep
from accuracy.card import MODEL
from accuracy.questions import TASKS, Question
from accuracy.videos import make_world, render_world, write_mp4

STEPS = 20
QUESTIONS = ("Code?", "Colour of star?", "star or ring first?", "Place before arrow?")


@pytest.fixture(name="small", scope="module")
def _small() -> reader.Reader:
    return reader.Reader(MODEL)


@pytest.fixture(name="features", scope="module")
def _features(small: reader.Reader, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    pytest.importorskip("qwen_vl_utils")
    frames = render_world(make_world(np.random.default_rng(7), STEPS), seed=7)
    path = write_mp4(tmp_path_factory.mktemp("video") / "video.mp4", frames)
    return small.see(path)


@pytest.fixture(name="texts", scope="module")
def _texts(small: reader.Reader) -> list[list[int]]:
    return small.texts([Question("find", text, "red") for text in QUESTIONS])


def hugging_faces(
    small: reader.Reader, features: torch.Tensor, text: list[int], attention: str
) -> Any:
    """The output of Hugging Face's own model, with ``attentions``."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation=attention
    ).eval()
    embed = model.model.language_model.embed_tokens
    before = embed(torch.tensor(small.before))
    out = model.model.language_model(
        inputs_embeds=torch.cat([before, features, embed(torch.tensor(text))])[None],
        position_ids=small.prompt(STEPS, len(text)).positions[:, None],
        use_cache=False,
        output_attentions=attention == "eager",
    )
    return model.lm_head(out.last_hidden_state[0, -len(text) :]), out.attentions


def test_a_file_becomes_four_tokens_a_step(features: torch.Tensor) -> None:
    assert features.shape[0] == 4 * STEPS


@torch.no_grad()
def test_full_attention_is_hugging_faces(
    small: reader.Reader, features: torch.Tensor, texts: list[list[int]]
) -> None:
    mine = small.logits(features, texts[:1], methods.full)
    expected, _ = hugging_faces(small, features, texts[0], "sdpa")
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "pevlm", "ape_t0.9", "star_attention_reused"])
def test_questions_in_one_pass_are_answered_as_if_alone(
    small: reader.Reader, features: torch.Tensor, texts: list[list[int]], name: str
) -> None:
    method = evaluate.all_methods()[name]
    together = small.logits(features, texts, method)
    alone = torch.cat([small.logits(features, [text], method) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)


@torch.no_grad()
def test_an_answer_is_right_to_its_end(small: reader.Reader, features: torch.Tensor) -> None:
    codes = [f"{a}{b}" for a in range(10) for b in range(10)]
    every = [Question("code", "Code?", code) for code in codes]
    right = small.right(features, every, methods.full)
    assert sum(right) == 1
    code = codes[right.index(True)]
    asked = [Question("code", "Code?", answer) for answer in (code, code[0], code + "1", "red")]
    assert small.right(features, asked, methods.full) == [True, False, False, False]


@torch.no_grad()
def test_every_method_runs_and_most_differ(
    small: reader.Reader, features: torch.Tensor, texts: list[list[int]]
) -> None:
    last: dict[str, Any] = {}
    for name, method in evaluate.all_methods().items():
        last[name] = small.logits(features, texts[:1], method)[-1]
        assert last[name].isfinite().all()
    torch.testing.assert_close(last["no_component"], last["ape_t1.0"])
    for name, logits in last.items():
        if name not in ("full", "no_component"):
            assert (logits - last["full"]).abs().max() > 1e-3, name


def test_the_sweep_has_the_masks_of_the_layout(small: reader.Reader) -> None:
    from pevlm_sglang.layout import FrameSpans, Layout

    prompt = small.prompt(14, 3)
    spans = FrameSpans(tuple(prompt.steps), frames_per_step=sweep.FRAMES_PER_STEP)
    found = sweep.settings()
    for sink in sweep.SINKS:
        for block in sweep.BLOCKS:
            layout = Layout.build([spans], sink_frames=sink, block_frames=block)
            n = prompt.length
            expected = [[layout.visible(q, k) for k in range(n)] for q in range(n)]
            mask = found[sweep.name(sink, block)](prompt).visible
            assert torch.equal(mask, torch.tensor(expected)), (sink, block)
            share = sweep.visible_fraction(small, 14, found[sweep.name(sink, block)])
            assert 0 < share <= 1


def test_blocks_in_tokens_cut_frames(small: reader.Reader) -> None:
    prompt = small.prompt(32, 3)
    for block in sweep.BLOCKS:
        tokens = sweep.tokens_of(block)
        visible = sweep.settings()[sweep.token_name(tokens)](prompt).visible
        starts = [q for q in range(prompt.start, prompt.end) if not visible[q, q - 1]]
        assert any((q - prompt.start) % 4 for q in starts), block
        # The sink is the same for all of them.
        assert visible[prompt.end - 1, : prompt.start + sweep.tokens_of(sweep.SINK)].all()


@torch.no_grad()
def test_attention_scores_are_hugging_faces(
    small: reader.Reader, features: torch.Tensor, texts: list[list[int]]
) -> None:
    case = reader.Case(2 * STEPS, features, [Question("find", text, "red") for text in QUESTIONS])
    found = attention_scores.scores(small, case, methods.full)
    size = len(small.before) + len(features) + max(map(len, texts))
    expected = {kind: np.zeros(size) for kind in attention_scores.QUERIES}
    for text in texts:
        _, given = hugging_faces(small, features, text, "eager")
        rows = torch.stack(given)[:, 0, :, -len(text) :].double()  # [layers, heads, n, keys]
        for kind, part in (("text", rows), ("last", rows[:, :, -1:])):
            mean = part.mean((0, 1, 2)).numpy()
            expected[kind][: len(mean)] += mean / len(texts)
    for kind, values in expected.items():
        mine = found.mean(kind, size)
        assert mine.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(mine, values, atol=1e-4)


def test_distance_is_the_attention_that_goes_elsewhere() -> None:
    one, other = (attention_scores.Scores(2, [2]) for _ in range(2))
    rows = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])
    moved = torch.tensor([[0.3, 0.3, 0.4, 0.0], [0.1, 0.2, 0.3, 0.4]])
    for scores, values in ((one, rows), (other, moved)):
        given = torch.zeros(1, 1, 4, 4)
        given[0, 0, 2:] = values
        scores.record(given)
    assert one.distance(other, "text") == pytest.approx(0.1)  # 0.2 of one of two queries
    assert one.distance(other, "last") == 0
    np.testing.assert_allclose(one.mean("text", 5), [0.3, 0.25, 0.25, 0.2, 0], atol=1e-6)


def test_the_written_answers_are_the_rows(tmp_path: Path) -> None:
    rows = [
        {
            "video": v,
            "frames": 64,
            "task": task,
            "question": f"{task}?",
            "answer": "red",
            "right": {"full": True, "other": v > 0},
        }
        for v in range(2)
        for task in TASKS
    ]
    path = tmp_path / "new" / "answers.json"
    answers.write(path, {"card": {"videos": 2}}, rows, ["full", "other"])
    found = json.loads(path.read_text())
    assert found["card"] == {"videos": 2}
    assert found["columns"] == ["video", "frames", "task", "question", "answer", "right"]
    assert found["questions"][0] == [0, 64, TASKS[0], f"{TASKS[0]}?", "red", "10"]
    assert found["questions"][-1][-1] == "11"
