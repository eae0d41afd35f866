"""The prefill of a whole language model: where its time goes, with PEVLM and without.

    python benchmarks/bench_llm_prefill.py                # a GPU: Qwen2.5-VL-7B, about a minute
    python benchmarks/bench_llm_prefill.py                # without one: a tiny model
    python benchmarks/bench_llm_prefill.py --path sglang  # inside a server, on either

Method, Hugging Face's path. A Qwen2 decoder of the released model's dimensions with random weights:
embeddings of noise in, hidden states out. It runs with transformers' ``sdpa`` (on a GPU with
cuDNN's kernel before flash's) and with ``attn_implementation="pevlm"`` on the same embeddings. The
attention's share is the time inside the attention function of all layers, the rest is the total
without it; a time is the median of some runs after one that is not counted, on a CPU of processor
time in one thread. The first layer builds the plan within the measured time. The gate comes first:
on a prompt of 2k tokens, the hidden states must equal those of the same model under a dense mask of
the definition, within twice the difference between transformers' own ``sdpa`` and ``eager`` under
it.

Method, SGLang's path. A server of benchmarks/serving.py answers about a video of noise, of which it
samples more and more frames, under full attention and PEVLM in turns and on empty caches. The
server's own stopwatch (benchmarks/stopwatch.py) gives the prefill's forwards, less the vision
tower, and the layers of attention in them. Prompts are cut into chunks as that server cuts them.
The gate is the server's; and full attention must have saved no attention pair.

The program ends with 1 if a gate is red, or if PEVLM was not sparse at the longest prompt.
``crossover`` is the shortest measured length with a sparse token from which on PEVLM's total is
never the longer one. Prompts without one are full attention on both sides: what differs there is
noise.

Sample output, on two cores that others were using too. Hugging Face's path:

  tokens  visible   full: attention    other    total   pevlm: attention    other    total speed-up
     512    1.000             0.077    0.212    0.289              0.055    0.213    0.268    1.08x
    1024    0.750             0.173    0.357    0.530              0.234    0.364    0.598    0.89x
    2048    0.438             0.750    0.836    1.586              0.473    0.757    1.231    1.29x
    4096    0.235             2.023    1.173    3.197              0.727    1.024    1.751    1.83x
    8192    0.121             5.366    1.906    7.273              1.082    1.504    2.586    2.81x
    crossover: 2048 tokens

SGLang's:

     591    1.000             0.023    0.041    0.064              0.023    0.044    0.067    0.96x
    1151    1.000             0.067    0.108    0.174              0.082    0.119    0.201    0.87x
    2271    1.000             0.248    0.193    0.441              0.171    0.145    0.316    1.40x
    4511    0.630             1.123    0.535    1.658              0.777    0.432    1.209    1.37x
    8991    0.348             4.442    1.154    5.596              1.591    1.233    2.824    1.98x
    crossover: 4511 tokens
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import card, clock, one_thread, summary, write_json
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from workload import MODELS, SYSTEM_TOKENS, TOKENS_PER_FRAME, Prompt, Shape

from pevlm_sglang import huggingface
from pevlm_sglang.layout import FrameSpans

PAPER = (16, 16)
GPU_LENGTHS = (2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 100_000)
CPU_LENGTHS, CPU_TOKENS_PER_FRAME = (512, 1_024, 2_048, 4_096, 8_192), 16
GATE_LENGTH = 2_048
KINDS = {"full": "timed_sdpa", "pevlm": "timed_pevlm"}


class AttentionClock:
    """Adds up the time inside attention, between CUDA events on a GPU.

    Attributes:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def timed(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            start = self.mark()
            result = attention(*args, **kwargs)
            self._spans.append((start, self.mark()))
            return result

        return function

    def take(self) -> float:
        """Seconds inside attention since the last call."""
        total = sum(self.between(*span) for span in self._spans)
        self._spans.clear()
        return total


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    config = transformers.Qwen2Config(
        vocab_size=64,  # embeddings come in ready, and no logits go out
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2**21,
    )
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return transformers.Qwen2Model(config).eval()
        finally:
            torch.set_default_dtype(default)


@contextlib.contextmanager
def best_sdpa(device: torch.device) -> Iterator[None]:
    """PyTorch's own order puts flash before cuDNN, which is the faster one on Hopper."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def frames_of(prompt: Prompt, tokens_per_frame: int) -> list[FrameSpans]:
    """The video of a prompt, a frame a step."""
    video_end = prompt.blocks[-1][1] if prompt.blocks else prompt.sink_end
    starts = range(SYSTEM_TOKENS, video_end, tokens_per_frame)
    return [FrameSpans(tuple((s, min(s + tokens_per_frame, video_end)) for s in starts))]


def noise(model: Any, length: int, shape: Shape) -> torch.Tensor:
    """``[1, length, hidden_size]`` embeddings."""
    generator = torch.Generator(model.device).manual_seed(length)
    size = (1, length, shape.hidden_size)
    return torch.randn(size, dtype=model.dtype, device=model.device, generator=generator)


def gate(model: Any, shape: Shape) -> float:
    """The error of the hidden states under PEVLM, as a share of what it may be."""
    prompt = Prompt.of_video(GATE_LENGTH, *PAPER, CPU_TOKENS_PER_FRAME)
    videos, embeddings = frames_of(prompt, CPU_TOKENS_PER_FRAME), noise(model, GATE_LENGTH, shape)
    length, device = prompt.length, embeddings.device
    mask = torch.zeros(length, length, dtype=torch.bool, device=device)
    for row in range(length):
        for start, end in prompt.keys_of(row):
            mask[row, start:end] = True
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(
            inputs_embeds=embeddings, attention_mask=mask[None, None], use_cache=False
        ).last_hidden_state
        model.set_attn_implementation("eager")
        additive = torch.zeros(mask.shape, dtype=embeddings.dtype, device=device)
        additive.masked_fill_(~mask, torch.finfo(embeddings.dtype).min)
        rival = model(
            inputs_embeds=embeddings, attention_mask=additive[None, None], use_cache=False
        ).last_hidden_state
        model.set_attn_implementation(KINDS["pevlm"])
        with huggingface.pevlm_frames(videos, sink_frames=PAPER[0], block_frames=PAPER[1]):
            found = model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    allowed = 2 * (rival - expected).abs().max().item()
    return (found - expected).abs().max().item() / allowed


def measure(
    model: Any,
    clock: AttentionClock,
    kind: str,
    videos: list[FrameSpans],
    embeddings: torch.Tensor,
    repeats: int,
) -> tuple[dict[str, float], int]:
    """Seconds in all, in attention and elsewhere, and how many attention calls were sparse."""
    model.set_attn_implementation(KINDS[kind])
    runs: list[tuple[float, float]] = []
    sparse_calls = 0
    with torch.no_grad(), best_sdpa(clock.device):
        for _ in range(repeats + 1):
            with huggingface.pevlm_frames(
                videos, sink_frames=PAPER[0], block_frames=PAPER[1]
            ) as frames:
                start = clock.mark()
                model(inputs_embeds=embeddings, use_cache=False)
                total = clock.between(start, clock.mark())
            runs.append((total, clock.take()))
            sparse_calls += frames.sparse_calls
    total = statistics.median(total for total, _ in runs[1:])
    attention = statistics.median(inside for _, inside in runs[1:])
    times = {"total_s": total, "attention_s": attention, "other_s": total - attention}
    return times, sparse_calls


def crossover(rows: list[dict[str, Any]]) -> int | None:
    """See the top of this file."""
    shortest = None
    for row in sorted(rows, key=lambda row: -row["length"]):
        if row["visible_fraction"] == 1 or row["pevlm"]["total_s"] > row["full"]["total_s"]:
            break
        shortest = row["length"]
    return shortest


HEADER = (
    f"{'tokens':>8}{'visible':>9}   {'full: attention':>15}{'other':>9}{'total':>9}"
    f"   {'pevlm: attention':>16}{'other':>9}{'total':>9}{'speed-up':>9}"
)


def line(row: dict[str, Any]) -> str:
    full, pevlm = row["full"], row["pevlm"]
    return (
        f"{row['length']:>8}{row['visible_fraction']:>9.3f}   {full['attention_s']:>15.3f}"
        f"{full['other_s']:>9.3f}{full['total_s']:>9.3f}   {pevlm['attention_s']:>16.3f}"
        f"{pevlm['other_s']:>9.3f}{pevlm['total_s']:>9.3f}"
        f"{full['total_s'] / pevlm['total_s']:>8.2f}x"
    )


def huggingface_rows(
    model_name: str, device: torch.device, lengths: Sequence[int] | None, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row a length; each carries the gate's ``error_of_budget``.

    Raises:
        SystemExit: the gate is red.
    """
    on_gpu = device.type == "cuda"
    per_frame = TOKENS_PER_FRAME if on_gpu else CPU_TOKENS_PER_FRAME
    clock = AttentionClock(device)
    register = transformers.AttentionInterface.register
    register(KINDS["full"], clock.timed(sdpa_attention_forward))
    register(KINDS["pevlm"], clock.timed(huggingface.attention_forward))
    shape = MODELS[model_name]
    model = make_model(shape, device, torch.bfloat16 if on_gpu else torch.float32)
    error = gate(model, shape)
    clock.take()
    if error > 1:
        sys.exit(f"bench_llm_prefill: the gate is red: {error:.2f} of the error it may be")
    for length in lengths or (GPU_LENGTHS if on_gpu else CPU_LENGTHS):
        prompt = Prompt.of_video(length, *PAPER, per_frame)
        videos = frames_of(prompt, per_frame)
        embeddings = noise(model, length, shape)
        row: dict[str, Any] = {"length": length, "visible_fraction": prompt.visible_fraction}
        row["error_of_budget"] = error
        for kind in KINDS:
            row[kind], sparse = measure(model, clock, kind, videos, embeddings, repeats)
            row[f"{kind}_sparse_calls"] = sparse
        yield row


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="prefill of a language model, in parts")
    default = "Qwen2.5-VL-7B" if on_gpu else "tiny"
    parser.add_argument("--path", choices=("huggingface", "sglang"), default="huggingface")
    parser.add_argument("--model", default=default, choices=MODELS)
    parser.add_argument("--lengths", type=int, nargs="+", help="Hugging Face's path: in tokens")
    parser.add_argument("--frames", type=int, nargs="+", help="SGLang's path: sampled frames")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        one_thread()
    about = card(device)
    print(f"{summary(about)}\n\n{HEADER}")
    result: dict[str, Any] = {"benchmark": "llm_prefill", "path": options.path, "card": about}
    result |= {"model": options.model, "sink_frames": PAPER[0], "block_frames": PAPER[1]}
    with contextlib.ExitStack() as stack:
        if options.path == "sglang":
            from prefill_sglang import rows
            from serving import Client, running

            server = stack.enter_context(running(options.model))
            result |= {"gate": server.gate, "cuda_graphs": Client(server.url).graphs()}
            measured = rows(server, options.frames, options.repeats)
        else:
            measured = huggingface_rows(options.model, device, options.lengths, options.repeats)
        found: list[dict[str, Any]] = []
        for row in measured:
            found.append(row)
            print(line(row), flush=True)
            result |= {"crossover": crossover(found), "rows": found, "complete": False}
            write_json(options.output, result)
    if not found[-1]["pevlm_sparse_calls"]:
        sys.exit("bench_llm_prefill: no attention call was sparse; longer prompts are needed")
    print(f"crossover: {result['crossover']} tokens")
    result["complete"] = True
    write_json(options.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
