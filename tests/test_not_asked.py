"""Installed and not asked for, the package changes no server: what SGLang and transformers hold in
a process with the plugin is what they hold in one without it, but for the flags and the name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.tiny import make_tiny_model

SNAPSHOT = r"""
import json, sys
from sglang.srt.plugins import load_plugins

load_plugins()

import sglang.srt.managers.mm_schedule as mm_schedule
import sglang.srt.managers.mm_utils as mm_utils
from sglang.srt.configs.model_config import multimodal_model_archs
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.entrypoints.openai import protocol
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.managers import multimodal_processor, schedule_batch
from sglang.srt.model_loader.utils import get_model_architecture
from sglang.srt.multimodal.customized_mm_processor_utils import _CUSTOMIZED_MM_PROCESSOR
from sglang.srt.parser import conversation, jinja_template_utils
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.utils.hf_transformers.common import _CONFIG_REGISTRY
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

argv = ["--model-path", sys.argv[1], "--device", "cpu", "--dtype", "float32"]
args = prepare_server_args(argv)
args.resolve_once()
multimodal_processor.import_processors("sglang.srt.multimodal.processors")
configs = {
    name: type("Config", (), {"architectures": [name], "model_type": "x"})
    for name in ("Qwen2_5_VLForConditionalGeneration", "LlavaQwenForCausalLM", "LlavaLlamaModel",
                 "InternVLChatModel", "NVILAForConditionalGeneration")
}

def processor(config):
    try:
        return str(multimodal_processor.get_mm_processor_cls(config))
    except Exception as error:
        return type(error).__name__

def same_engine():
    engine = Engine.__new__(Engine)
    built = engine.server_args_class(model_path=sys.argv[1], device="cpu")
    return [type(built).__name__, sorted(n for n in vars(built) if n.startswith("_pevlm"))]

video = protocol.ChatCompletionMessageContentVideoURL
wrapped = (mm_utils.embed_mm_inputs, mm_utils.get_embedding_and_mask,
           mm_schedule._get_chunked_embedding_full,
           schedule_batch.MultimodalDataItem.set_pad_value,
           schedule_batch.MultimodalInputs.release_features)
print("SNAPSHOT" + json.dumps({
    "arguments": args.resolved_dict(),
    "private": sorted(name for name in vars(args) if "pevlm" in name),
    "configs": sorted(CONFIG_MAPPING._extra_content),
    "tokenizers": sorted(map(str, TOKENIZER_MAPPING._extra_content)),
    "sglang configs": sorted(_CONFIG_REGISTRY),
    "architectures": sorted(multimodal_model_archs),
    "customized": sorted(map(str, _CUSTOMIZED_MM_PROCESSOR)),
    "processors": {name: processor(config) for name, config in configs.items()},
    "templates": len(conversation.matching_function_registry),
    "media keys": [list(m.GLM_MEDIA_CONFIG_KEYS) for m in (conversation, jinja_template_utils)],
    "video_url": sorted(video.model_fields),
    "engine class": str(Engine.server_args_class),
    "engine": same_engine(),
    "wrapped": [hasattr(function, "pevlm_original") for function in wrapped],
    "backends": sorted(ATTENTION_BACKENDS),
}, default=str))
"""


def snapshot(model: Path, *, plugin: bool) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT, str(model)],
        env={
            **os.environ,
            "SGLANG_PLATFORM": "pevlm_cpu",
            "SGLANG_PLUGINS": "pevlm" if plugin else "no_plugin",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SNAPSHOT")]
    assert lines, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("SNAPSHOT"))
    return found


@pytest.mark.slow
def test_nothing_but_the_name(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, num_layers=1, vision_depth=1)
    without, beside = (snapshot(model, plugin=plugin) for plugin in (False, True))
    assert set(beside.pop("backends")) - set(without.pop("backends")) == {"pevlm"}
    for drawn in ("random_seed", "port", "dist_init_addr", "nccl_port"):  # anew in each process
        without["arguments"].pop(drawn, None)
        beside["arguments"].pop(drawn, None)
    assert beside == without
    assert without["private"] == []
    assert without["engine"] == ["ServerArgs", []]


def test_the_snapshot_sees_what_pevlm_does() -> None:
    """Else the comparison would be of nothing."""
    pytest.importorskip("sglang")
    code = (
        "from pevlm_sglang.families import registry; registry.read_checkpoints();"
        "from sglang.srt.configs.model_config import multimodal_model_archs as a;"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING as c;"
        "print('LlavaLlamaModel' in a, 'llava_llama' in c._extra_content)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split()[-2:] == ["True", "True"]
