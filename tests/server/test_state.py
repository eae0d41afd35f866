"""State that outlives its reason: after new weights or a flush, nothing of before is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.exchange import SHARP, Exchange, about
from support.families.qwen_vl import QwenVLOracle
from support.oracle import Setting

Clip = Callable[..., Path]

pytestmark = pytest.mark.server
one_server = pytest.mark.parametrize("exchange", ["chunk_257"], indirect=True)


@pytest.fixture(scope="module")
def other_model(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with another vision tower."""
    directory = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(model("qwen2_5_vl"), directory)
    weights = load_file(directory / "model.safetensors")
    changed = {
        name: weight * 1.5 if "visual" in name else weight for name, weight in weights.items()
    }
    assert any("visual" in name for name in changed)
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def load(exchange: Exchange, model: Callable[[str], Path]) -> Iterator[Callable[[Path], None]]:
    """Gives the server the weights of a directory; its own again afterwards."""

    def load(directory: Path) -> None:
        body = {"model_path": str(directory), "flush_cache": True}
        reply = exchange.server.post("/update_weights_from_disk", body).json()
        assert reply["success"], reply

    yield load
    load(model("qwen2_5_vl"))


@one_server
def test_a_video_seen_before_new_weights(
    exchange: Exchange, clip: Clip, other_model: Path, load: Callable[[Path], None]
) -> None:
    """The same clip, answered with the new tower and not with an embedding of the old one."""
    question = about(clip(10, 7), setting=Setting(4, 4))
    exchange.check(question)
    load(other_model)
    changed = Exchange(exchange.server, QwenVLOracle(other_model))
    [answer] = changed.check(question)
    assert answer.cached_tokens == 0
    assert exchange.difference(question, answer, question.setting) > SHARP, "B must differ from A"


@one_server
def test_flush_forgets_embeddings(exchange: Exchange, clip: Clip) -> None:
    question = about(clip(10, 8), setting=Setting(4, 4))
    exchange.check(question)
    before = exchange.totals()["vision_runs"]
    exchange.flush()
    exchange.check(question)
    assert exchange.totals()["vision_runs"] == before + 1
