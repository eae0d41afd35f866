"""The evaluation loop: its attention is Hugging Face's where nothing is hidden, and its statistics
say what they should on made-up answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import evaluate, methods, tables
from accuracy.questions import TASKS
from accuracy.videos import make_world, render_world, write_mp4

STEPS = 20


@pytest.fixture(name="reader", scope="module")
def _reader() -> evaluate.Reader:
    return evaluate.Reader(evaluate.MODEL)


@pytest.fixture(name="features", scope="module")
def _features(reader: evaluate.Reader, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    pytest.importorskip("qwen_vl_utils")
    frames = render_world(make_world(np.random.default_rng(7), STEPS), seed=7)
    path = write_mp4(tmp_path_factory.mktemp("video") / "video.mp4", frames)
    return reader.see(path)


def test_a_file_becomes_four_tokens_a_step(
    reader: evaluate.Reader, features: torch.Tensor, tmp_path: Path
) -> None:
    assert features.shape[0] == 4 * STEPS


def test_full_attention_is_hugging_faces(reader: evaluate.Reader, features: torch.Tensor) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokens = torch.tensor([reader.tokenizer.encode(evaluate.AFTER.format(question="Code?"))])
    prompt = reader.prompt(STEPS, tokens.shape[1])
    with torch.no_grad():
        mine = reader.logits(features, tokens, methods.full(prompt))
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            evaluate.MODEL, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        embed = model.model.language_model.embed_tokens
        before = embed(torch.tensor(reader.before))
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([before, features, embed(tokens[0])])[None],
            position_ids=prompt.positions[:, None],
            use_cache=False,
        ).last_hidden_state
        expected = model.lm_head(hidden[:, -tokens.shape[1] :])
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-3)


def test_every_method_runs_and_most_differ(reader: evaluate.Reader, features: torch.Tensor) -> None:
    tokens = torch.tensor([reader.tokenizer.encode(evaluate.AFTER.format(question="Code?"))])
    prompt = reader.prompt(STEPS, tokens.shape[1])
    last: dict[str, Any] = {}
    with torch.no_grad():
        for name, method in evaluate.all_methods().items():
            last[name] = reader.logits(features, tokens, method(prompt))[0, -1]
            assert last[name].isfinite().all()
    torch.testing.assert_close(last["no_component"], last["ape_t1.0"])
    for name, logits in last.items():
        if name not in ("full", "no_component"):
            assert (logits - last["full"]).abs().max() > 1e-3, name


def made_up(right: dict[str, list[bool]], videos: int) -> list[dict[str, Any]]:
    """``right[method][video]`` for each task of each video."""
    return [
        {"video": v, "task": task, "right": {name: ok[v] for name, ok in right.items()}}
        for v in range(videos)
        for task in TASKS
    ]


def test_summary_finds_what_differs_and_only_that() -> None:
    rng = np.random.default_rng(0)
    full = (rng.random(80) < 0.9).tolist()
    same = full[1:] + full[:1]
    worse = [ok and bool(rng.random() < 0.7) for ok in full]
    found = evaluate.summary(
        made_up({"full": full, "same": same, "worse": worse}, 80), ["full", "same", "worse"]
    )
    assert found["full"]["accuracy"] == pytest.approx(np.mean(full), abs=1e-4)
    assert found["full"]["minus_full"] == 0
    assert found["full"]["p_value"] == 1
    assert found["same"]["p_value"] > 0.2
    assert found["worse"]["p_value"] < 0.01
    assert found["worse"]["minus_full"] == pytest.approx(np.mean(worse) - np.mean(full), abs=1e-4)
    low, high = found["full"]["interval"]
    assert low < np.mean(full) < high


def test_tables_have_a_row_a_method() -> None:
    names = [*evaluate.all_methods()]
    found = evaluate.summary(made_up({name: [True, False] * 5 for name in names}, 10), names)
    text = tables.by_method(found)
    assert all(name in text for name in tables.MAIN.values())
    assert text.count("\n") == len(tables.MAIN) + 2
    assert "50.0" in tables.ablation(found)
    assert "APE" in tables.reuse(found)
