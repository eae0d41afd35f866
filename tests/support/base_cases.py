"""All cases of one base backend, with some prefill kernels, in a process of its own:
``python -m support.base_cases BASE KERNEL...``.

A process of its own, because Triton's interpreter and the emulated libraries have to be in place
before anything is imported. Prints one JSON line: cases by kind, and the largest error.

The fixtures are SGLang's own (sglang.test.kits.attention_unittest): its pool, its slot layouts, its
forward batch and its reference for dense attention. What PEVLM adds is checked against a dense mask
expanded from ``Layout.visible``.
"""

from __future__ import annotations

import json
import sys
import unittest
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch

from pevlm_kernels.reference import masked_attention_lse
from pevlm_sglang.attention.plan import virtual_sequences
from pevlm_sglang.layout import FrameSpans, Layout
from pevlm_sglang.observe.observer import Observer, RequestLayout
from support import emulated_kernels

HEAD_DIM = 32
MAX_LENGTH = 160  # more queries than any kernel's tile has
NARROW = torch.float8_e5m2
K_SCALE, V_SCALE = 0.37, 2.3
TOLERANCE = 2e-5  # fp32, a hidden size of 64


@torch.no_grad()
def main(base: str, *kernels: str) -> None:
    emulated_kernels.install(base)
    summary: dict[str, Any] = {"base": base, "taken": {}}
    dense = _within(dense_cases(base), "dense")
    worst = max(dense)
    summary["dense"] = len(dense)
    for kernel in kernels:
        fixture = _fixture(_kit().make_dense_cases(base)[0], kernel)
        taken = summary["taken"][kernel] = fixture.backend.pevlm_kernel
        kinds = {"planned": planned_cases, "sparse": sparse_cases}
        if takes_fp8(base, taken):
            kinds |= {"fp8": fp8_cases, "unscaled": unscaled_cases}
        for kind, cases in kinds.items():
            errors = _within(cases(base, taken), f"{kernel}, {kind}")
            summary[kind] = summary.get(kind, 0) + len(errors)
            worst = max([worst, *errors])
    print(json.dumps({**summary, "max_error": worst}))


def _within(errors: Iterable[float], kind: str) -> list[float]:
    """The errors of cases; the first that is too large ends them."""
    found = []
    for number, error in enumerate(errors, 1):
        assert error <= TOLERANCE, f"{kind}, case {number}: error {error} > {TOLERANCE}"
        found.append(error)
    return found


def dense_cases(base: str) -> Any:
    """SGLang's dense kit through a backend with PEVLM attached: text requests are untouched."""
    for case in _kit().make_dense_cases(base):
        if base in emulated_kernels.BASES and case.forward_mode.is_decode():
            continue  # decode is the base's own, and its kernels are not emulated
        fixture = _fixture(case)
        actual = _kit().run_dense_fixture_eager(fixture)
        yield _error(actual, _kit().expected_dense_fixture_output(fixture))


def planned_cases(base: str, kernel: str) -> Any:
    """The kit's prefill cases again, forced through a plan of one virtual sequence a request."""
    for case in _kit().make_dense_cases(base):
        if case.forward_mode.is_decode():
            continue
        fixture = _fixture(case, kernel)
        fixture.backend.init_forward_metadata(fixture.forward_batch)
        layouts = [Layout()] * case.batch_size
        sequences = virtual_sequences(layouts, case.prefix_lens, case.extend_lens)
        fixture.backend.pevlm_plan(sequences, fixture.forward_batch)
        actual = _forward(fixture)
        yield _error(actual, _kit().expected_dense_fixture_output(fixture))


def sparse_cases(base: str, kernel: str) -> Any:
    """Batches of video, text and decode rows, cut anywhere, in pages of 1 and 16."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    wide = _video_layout(sink_frames=1, block_frames=2)
    no_sink = _video_layout(sink_frames=0, block_frames=3)
    text = Layout()
    batches = [
        ([wide], (0,), (50,)),
        ([wide], (20,), (30,)),  # the prefix ends inside a block, and inside a frame
        ([wide, text, no_sink], (13, 9, 30), (21, 4, 17)),
        ([text, wide, text], (40, 0, 0), (1, 25, 140)),  # a decode row, two tiles of text
        ([no_sink], (46, ), (3,)),  # a last token of a block, then the question
    ]  # fmt: skip
    for kv_heads, page_size in ((2, 1), (1, 16)):
        for layouts, prefix, extend in batches:
            case = _kit().DenseAttentionCase(
                name="pevlm",
                backend=base,
                forward_mode=ForwardMode.EXTEND,
                num_heads=4,
                num_kv_heads=kv_heads,
                page_size=page_size,
                prefix_lens=prefix,
                extend_lens=extend,
            )
            fixture = _fixture(case, kernel)
            fixture.forward_batch.mm_inputs = [
                None if layout is text else SimpleNamespace(pevlm=RequestLayout(layout, None))
                for layout in layouts
            ]
            fixture.backend.init_forward_metadata(fixture.forward_batch)
            assert fixture.backend.pevlm_observer.totals.sparse_forwards == 1
            actual = _forward(fixture)
            yield _error(actual, _expected_sparse(fixture, layouts))
            # Its CUDA graphs for decode are made of pages of the pool's size.
            assert getattr(fixture.backend, "page_size", page_size) == page_size
            # The next forward is dense again: nothing of the plan may stay behind.
            fixture.forward_batch.mm_inputs = None
            actual = _kit().run_dense_fixture_eager(fixture)
            yield _error(actual, _kit().expected_dense_fixture_output(fixture))


def takes_fp8(base: str, kernel: str) -> bool:
    """Whether the cases on an fp8 cache are for this kernel. Triton's own one reads new keys as
    they were before they were stored: its numerics are its own."""
    return (base, kernel) != ("triton", "base")


def fp8_cases(base: str, kernel: str) -> Any:
    """A video on an fp8 pool with scales, as SGLang's pool stores them."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    layout = _video_layout(sink_frames=1, block_frames=2)
    for page_size in (1, 16):
        fixture = _scaled_fixture(base, kernel, page_size, layout)
        backend = fixture.backend
        backend.token_to_kv_pool = MHATokenToKVPool(
            size=backend.token_to_kv_pool.size,
            page_size=page_size,
            dtype=NARROW,
            head_num=2,
            head_dim=HEAD_DIM,
            layer_num=1,
            device="cpu",
            enable_memory_saver=False,
            enable_alt_stream=False,
        )
        _tell_the_dtype(backend)
        backend.init_forward_metadata(fixture.forward_batch)
        actual = _forward(fixture)
        # FlashAttention-3's own products are of fp8: SGLang rounds the queries too.
        narrow_queries = (base, kernel) == ("fa3", "base")
        scaled = base != "torch_native"  # whose own decode reads without scales

        def stored(x: torch.Tensor, scale: float, scaled: bool = scaled) -> torch.Tensor:
            factor = scale if scaled else 1.0
            return (x / factor).to(NARROW).to(x.dtype) * factor

        expected = _expected_sparse(fixture, [layout], stored, narrow_queries=narrow_queries)
        yield _error(actual, expected)
        assert _error(actual, _expected_sparse(fixture, [layout])) > 100 * TOLERANCE, "no rounding"


def unscaled_cases(base: str, kernel: str) -> Any:
    """A layer with scales on a pool that rounds nothing, and so divides by none: a checkpoint made
    for an fp8 cache, served without one."""
    if (base, kernel) == ("flashinfer", "base"):
        return  # SGLang's multiplies by the scales whatever its pool did, in dense batches too
    layout = _video_layout(sink_frames=1, block_frames=2)
    fixture = _scaled_fixture(base, kernel, 1, layout)
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    yield _error(_forward(fixture), _expected_sparse(fixture, [layout]))


def _scaled_fixture(base: str, kernel: str, page_size: int, layout: Layout) -> Any:
    """A request of 50 tokens, on a layer with scales."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    case = _kit().DenseAttentionCase(
        name="pevlm",
        backend=base,
        forward_mode=ForwardMode.EXTEND,
        num_heads=4,
        num_kv_heads=2,
        page_size=page_size,
        prefix_lens=(0,),
        extend_lens=(50,),
    )
    fixture = _fixture(case, kernel)
    layer = fixture.actual_module.attn
    layer.k_scale, layer.v_scale = torch.tensor(K_SCALE), torch.tensor(V_SCALE)
    layer.k_scale_float, layer.v_scale_float = K_SCALE, V_SCALE
    fixture.forward_batch.mm_inputs = [SimpleNamespace(pevlm=RequestLayout(layout, None))]
    return fixture


def _tell_the_dtype(backend: Any) -> None:
    """What the constructors of SGLang's backends take from a server with an fp8 cache."""
    if hasattr(backend, "kv_cache_dtype_str"):  # FlashAttention
        backend.kv_cache_dtype, backend.kv_cache_dtype_str = NARROW, "fp8_e5m2"
    if hasattr(backend, "flashinfer_kv_cache_dtype"):
        backend.flashinfer_kv_cache_dtype = backend.indices_updater_prefill.data_type = NARROW


def _video_layout(*, sink_frames: int, block_frames: int) -> Layout:
    video = FrameSpans(tuple((5 + 6 * i, 11 + 6 * i) for i in range(7)))  # tokens [5, 47)
    return Layout.build([video], sink_frames=sink_frames, block_frames=block_frames)


def _expected_sparse(
    fixture: Any,
    layouts: list[Layout],
    stored: Callable[[torch.Tensor, float], torch.Tensor] = lambda x, scale: x,
    *,
    narrow_queries: bool = False,
) -> torch.Tensor:
    """Args:
    stored: a key or value as it comes back from the cache, given the layer's scale.
    narrow_queries: whether the kernel rounds queries to the cache's type.
    """
    case, module = fixture.case, fixture.actual_module
    k_scale, v_scale = (getattr(module.attn, f"{x}_scale_float") or 1.0 for x in "kv")
    outputs = []
    inputs = fixture.input_hidden.split(case.extend_lens)
    for layout, past, new in zip(layouts, fixture.prefix_hidden, inputs, strict=True):
        q, k, v = (
            x.view(len(past) + len(new), -1, HEAD_DIM)
            for x in module.project_qkv(torch.cat([past, new]))
        )
        length = len(q)
        mask = torch.tensor(
            [[layout.visible(i, j) for j in range(length)] for i in range(len(past), length)]
        )
        k, v = stored(k, k_scale), stored(v, v_scale)
        q = q.to(NARROW).to(q.dtype) if narrow_queries else q
        scale = module.attn.scaling
        out, _ = masked_attention_lse(q[len(past) :], k, v, mask, softmax_scale=scale)
        outputs.append(module.o_proj(out.flatten(1)))
    return torch.cat(outputs)


def _kit() -> Any:
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention

    return dense_attention


class _NoSkip(unittest.TestCase):
    """The kit skips a backend that it cannot construct. Here that is a failure."""

    def skipTest(self, reason: Any) -> Any:  # noqa: N802 - unittest's name
        raise AssertionError(f"skipped: {reason}")


def _fixture(case: Any, kernel: str = "auto") -> Any:
    from pevlm_sglang.attention.bases import attach
    from pevlm_sglang.attention.kernel_choice import attention_layers

    fixture = _kit().build_dense_attention_fixture(
        _NoSkip(),
        case,
        head_dim=HEAD_DIM,
        hidden_size=64,
        max_context_len=MAX_LENGTH,
        dtype=torch.float32,
        device="cpu",
        loc_layout="shuffled_pages",
    )
    fixture.backend.is_multimodal = True  # the kit's model is text
    attach(
        fixture.backend,
        Observer(log=False, metrics=False),
        layers=attention_layers(fixture.actual_module),
        dtype=torch.float32,
        kernel=kernel,
    )
    return fixture


def _forward(fixture: Any) -> torch.Tensor:
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    with forward_context(ForwardContext(attn_backend=fixture.backend)):
        return fixture.actual_module(fixture.input_hidden, fixture.forward_batch)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(actual).all()
    return (actual - expected).abs().max().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
