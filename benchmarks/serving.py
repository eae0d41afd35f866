"""A server for the benchmarks: SGLang with PEVLM and a stopwatch, behind a gate; no download.

    python benchmarks/serving.py                              # serves a tiny model until Ctrl-C
    python benchmarks/serving.py --model Qwen2.5-VL-7B        # on a GPU: real dimensions
    python benchmarks/serving.py --model Qwen2.5-VL-7B -- sh -c 'benchmark one; benchmark two'
    python benchmarks/serving.py --cuda-graphs breakable      # prefill in graphs too

The third form runs a command while the server is up, so that several benchmarks share one start;
they find it by the variables SERVER_URL and SERVER_GATE. A model of real dimensions is made on the
spot: its configuration, a tokenizer of a few hundred tokens, and SGLang's random weights
(``--load-format dummy``). On a GPU, CUDA graphs are SGLang's default (of Qwen's models: of decode,
and not of prefill), unless ``--cuda-graphs`` says otherwise; results have what the server says it
has.

The gate comes before the server that is measured, and no variable is set without it. A small
Qwen2.5-VL, in the dtype and on the base backend of the measured one, answers about a clip; its
log-probabilities are compared with Hugging Face's model under the dense mask, in fp32 on the CPU.
Under PEVLM they may be as far from it as twice what they are under full attention (or 1e-4, if that
is more), and must be further than twice their own distance from the answer under the other mask.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import stopwatch
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # `support` lives there

from pevlm_sglang.tune import client  # noqa: E402
from support.exchange import BATCH_ENV, TOLERANCE, Exchange, about  # noqa: E402
from support.families.qwen_vl import QwenVLOracle  # noqa: E402
from support.oracle import Setting  # noqa: E402
from support.server import Server  # noqa: E402
from support.tiny import make_tiny_model  # noqa: E402
from support.video import write_video  # noqa: E402

WORK_DIR = ROOT / ".cache" / "bench_serving"
TINY: dict[str, Any] = {"num_layers": 6, "hidden_size": 256, "vision_depth": 1}
GATE_SETTING = Setting(4, 4)
FEW_PIXELS = ("--mm-process-config", '{"video": {"min_pixels": 3136}}')
GRAPHS = {
    "sglang": (),
    "off": ("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    "breakable": ("--cuda-graph-backend-prefill", "breakable"),
    "full": ("--cuda-graph-backend-prefill", "full"),
}
"""Value of ``--cuda-graphs`` → the server's flags; the first is the default, SGLang's own."""
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# The released models' config.json.
REAL: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


class Running(NamedTuple):
    """A server that passed its gate.

    Attributes:
        url: of the server.
        gate: the verdict, in words.
    """

    url: str
    gate: str


def write_model(directory: Path, small: Path, text: dict[str, Any], vision: dict[str, Any]) -> Path:
    """A model directory of these dimensions with no weights: tokenizer and processor are the small
    model's.

    Args:
        text, vision: fields of ``text_config`` and ``vision_config`` in config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in small.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((small / "config.json").read_text())
    for old in ("rope_scaling", "head_dim", "layer_types", "max_window_layers"):
        config["text_config"].pop(old, None)
    config["text_config"] |= {"rope_parameters": ROPE, **text}
    config["vision_config"] |= {**vision, "out_hidden_size": text["hidden_size"]}
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"]
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def write_real(name: str, work: Path, small: Path) -> Path:
    """A released model's dimensions; see :func:`write_model`."""
    return write_model(work / name, small, REAL[name], VISION)


@contextmanager
def running(model: str, work: Path = WORK_DIR, graphs: str = "sglang") -> Iterator[Running]:
    """The server that the environment names, or one of its own.

    Args:
        model: ``tiny``, or a key of ``REAL`` on a GPU.
        graphs: a key of ``GRAPHS``.

    Raises:
        SystemExit: the gate is red, a model of real dimensions or graphs are wanted without a GPU,
            or graphs of a server that runs.
    """
    if "SERVER_URL" in os.environ:
        if graphs != "sglang":
            sys.exit(
                f"--cuda-graphs: expected none beside SERVER_URL, whose server runs, got {graphs}"
            )
        yield Running(os.environ["SERVER_URL"], os.environ["SERVER_GATE"])
        return
    on_gpu = torch.cuda.is_available()
    if model != "tiny" and not on_gpu:
        sys.exit(f"--model: expected tiny on a machine without a GPU, got {model}")
    if graphs != "sglang" and not on_gpu:
        sys.exit(f"--cuda-graphs: expected none on a machine without a GPU, got {graphs}")
    small = make_tiny_model(work / "model", **TINY)
    with _server(small, work, on_gpu=on_gpu, dummy=False, graphs=graphs) as server:
        verdict = _gate(server, small, work)
        if model == "tiny":
            yield Running(server.url, verdict)
            return
    real = write_real(model, work, small)
    with _server(real, work, on_gpu=on_gpu, dummy=True, graphs=graphs) as server:
        yield Running(server.url, verdict)


def launch_flags(*, on_gpu: bool, dummy: bool, graphs: str) -> list[str]:
    """Of the server; see :func:`running`."""
    flags = ["--attention-backend", "pevlm", "--skip-server-warmup", *FEW_PIXELS]
    if on_gpu:
        flags += ["--device", "cuda", "--dtype", "bfloat16", *GRAPHS[graphs]]
        flags += ["--max-total-tokens", "400000", "--mem-fraction-static", "0.75"]
    else:
        flags += ["--chunked-prefill-size", "-1"]
    if dummy:
        flags += ["--load-format", "dummy"]
    return flags


def _server(model: Path, work: Path, *, on_gpu: bool, dummy: bool, graphs: str) -> Server:
    plugin = stopwatch.install(work / "plugin")
    path = os.pathsep.join([str(plugin), os.environ.get("PYTHONPATH", "")])
    env = {**BATCH_ENV, "PYTHONPATH": path.rstrip(os.pathsep), "SGLANG_VLM_CACHE_SIZE_MB": "0"}
    if on_gpu:
        env |= {"SGLANG_PLATFORM": "", "TORCHDYNAMO_DISABLE": "0"}
    flags = launch_flags(on_gpu=on_gpu, dummy=dummy, graphs=graphs)
    log = work / f"server-{model.name}.log"
    return Server(model, *flags, env=env, log_path=log, startup_timeout=240)


def _gate(server: Server, model: Path, work: Path) -> str:
    clip = write_video(work / "gate.mp4", seconds=12, size=(224, 168))
    exchange = Exchange(server, QwenVLOracle(model))
    questions = about(clip, setting=GATE_SETTING), about(clip, setting=None)
    sparse, full = exchange.ask(*questions)
    own = exchange.difference(questions[0], sparse, GATE_SETTING)
    allowed = max(2 * exchange.difference(questions[1], full, None), TOLERANCE)
    others = exchange.difference(questions[0], sparse, None)
    verdict = f"{own:.1e} from the reference, of {allowed:.1e}; {others:.1e} from the other mask's"
    if not own <= allowed or not others > 2 * own:
        sys.exit(f"gate is red: {verdict}")
    print(f"gate: {verdict}", flush=True)
    return verdict


class Client(client.Client):
    """Requests to a server, timed from sending to the first streamed token."""

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout=1800)

    def totals(self) -> dict[str, float]:
        """What the server counted so far: the stopwatch's seconds, ``vision``, ``pairs_saved``."""
        state = self.info()["internal_states"][0]
        pevlm: dict[str, Any] = state["pevlm"]
        found: dict[str, float] = dict(state[stopwatch.KEY])
        return found | {"vision": pevlm["vision_seconds"], "pairs_saved": pevlm["pairs_saved"]}

    def graphs(self) -> dict[str, str]:
        """Phase (``decode``, ``prefill``) → the kind of its CUDA graphs, or ``disabled``."""
        info = self.info()
        kinds = {phase: of["backend"] for phase, of in info["cuda_graph_config"].items()}
        return kinds if info["device"] == "cuda" else dict.fromkeys(kinds, "disabled")

    def video(self, path: Path, *, pevlm: bool, max_frames: int | None = None) -> tuple[float, int]:
        """Seconds to the first token, and tokens of the prompt."""
        answer = self.ask(
            path,
            "What happens in the video?",
            setting={"enabled": pevlm},
            max_tokens=2,
            sampling={"max_frames": max_frames} if max_frames else None,
        )
        return answer.ttft, answer.prompt_tokens

    def split(self, path: Path, *, pevlm: bool, max_frames: int | None = None) -> dict[str, float]:
        """One request on empty caches, in seconds: see ``PARTS``; and ``prompt_tokens``.

        Raises:
            SystemExit: PEVLM saved no attention pair, or full attention did.
        """
        self.flush()
        before = self.totals()
        first_token, tokens = self.video(path, pevlm=pevlm, max_frames=max_frames)
        spent = {name: total - before[name] for name, total in self.totals().items()}
        saved = spent["pairs_saved"]
        if saved and not pevlm:
            sys.exit(f"full attention: {saved} attention pairs saved; see /server_info")
        prefill = spent["forward"] - spent["vision"]
        parts = {
            "decode": spent["decode"],
            "preprocess": spent["prepare"] - spent["decode"],
            "vision": spent["vision"],
            "attention": spent["attention"],
            "other_prefill": prefill - spent["attention"],
        }
        parts["rest"] = first_token - sum(parts.values())
        return {"first_token": first_token, **parts, "prompt_tokens": tokens, "saved": saved}


PARTS = {
    "decode": "opening the video and decoding its sampled frames",
    "preprocess": "resizing, patches, tokens: the rest of the tokenizer process's work",
    "vision": "the vision tower, on its device",
    "attention": "attention of the language model's prefill, on its device",
    "other_prefill": "the rest of the language model's prefill",
    "rest": "what is left of the time to the first token: HTTP, messages, scheduling, sampling",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="a server for the benchmarks")
    default = "Qwen2.5-VL-7B" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--model", choices=("tiny", *REAL), default=default)
    parser.add_argument("--cuda-graphs", choices=GRAPHS, default="sglang")
    parser.add_argument("command", nargs="*", help="run this and stop (after --)")
    options = parser.parse_args()
    with running(options.model, graphs=options.cuda_graphs) as server:
        print(f"serving {options.model}: {server.url}", flush=True)
        if options.command:
            env = {**os.environ, "SERVER_URL": server.url, "SERVER_GATE": server.gate}
            sys.exit(subprocess.run(options.command, env=env, check=False).returncode)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
