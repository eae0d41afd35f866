"""``pevlm show`` of a checkpoint whose JSON files lack something or hold something else: one line
that names it, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pevlm_sglang.tools.cli import main

Files = dict[str, dict[str, Any]]

QWEN: Files = {
    "config.json": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": {"max_position_embeddings": 128_000},
        "vision_config": {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    },
    "preprocessor_config.json": {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2},
}
INTERNVL: Files = {
    "config.json": {
        "architectures": ["InternVLChatModel"],
        "force_image_size": 448,
        "downsample_ratio": 0.5,
        "llm_config": {"max_position_embeddings": 40_960},
        "vision_config": {"image_size": 448, "patch_size": 14},
    }
}
LLAVA: Files = {
    "config.json": {
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_newline_position": "grid",
        "max_position_embeddings": 32_768,
    }
}
LONGVILA: Files = {
    "config.json": {"architectures": ["LlavaLlamaModel"], "num_video_frames": 256},
    "vision_tower/config.json": {"image_size": 448, "patch_size": 14},
    "mm_projector/config.json": {"mm_projector_type": "mlp_downsample"},
    "llm/config.json": {"max_position_embeddings": 327_680},
}
ODD: tuple[Any, ...] = (None, 7, 0, -1, 1.5, 1e400, True, "x", "", [], [1], {}, {"a": 1})


def places(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@pytest.mark.parametrize("files", [QWEN, INTERNVL, LLAVA, LONGVILA])
def test_every_value_of_every_file(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(changed: Files) -> int:
        for name, content in changed.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content))
        return main(["show", str(tmp_path), "--duration", "20"])

    assert show(files) == 0, "as it is"
    words = {place[-1] for place in places(files)}
    for name, *path in places(files):
        if not path:
            continue
        for value in (*ODD, "left out"):
            changed: Any = deepcopy(files)
            holder = changed[name]
            for step in path[:-1]:
                holder = holder[step]
            if value == "left out":
                del holder[path[-1]]
            else:
                holder[path[-1]] = value
            capsys.readouterr()
            code = show(changed)
            shown = capsys.readouterr()
            assert code in (0, 2)
            assert (code == 2) == shown.err.startswith("pevlm: ")
            assert shown.err.count("\n") == (code == 2)
            assert code == 0 or any(word in shown.err for word in (*words, "architecture"))
