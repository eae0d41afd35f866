"""Prefill CUDA graphs: what SGLang's runner asks, and what it is told.

A graph of kind FULL has full attention baked in, so no batch with LOCAL tokens may run in one; what
is dense may. SGLang's own functions ask here, of a runner that never captured anything.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.managers.scheduler_components import dp_attn
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from test_layout import build
from test_oracle import Video, write

from pevlm_sglang.attention.backend import PevlmBackend
from pevlm_sglang.observe.observer import TEXT, Observer, RequestLayout

# 1 of text, sink [1, 4), blocks [4, 7), [7, 10), [10, 13), and 7 of text. The first block sees all
# that is before it.
VIDEO = RequestLayout(build(write(1, Video((3,) * 4), 7), 1, 1), None)

Rows = list[tuple[RequestLayout, int, int]]  # with prefix and length of what is prefilled
BATCHES: list[tuple[str, Rows, bool]] = [
    ("text", [(TEXT, 0, 50)], False),
    ("up to the first sparse token", [(VIDEO, 0, 7)], False),
    ("the first sparse token", [(VIDEO, 0, 8)], True),
    ("a sparse token", [(VIDEO, 7, 1)], True),
    ("the last sparse token", [(VIDEO, 12, 3)], True),
    ("text behind a video", [(VIDEO, 13, 7)], False),
    ("a decode row behind a video", [(VIDEO, 30, 1)], False),
    ("beside text, dense", [(TEXT, 0, 50), (VIDEO, 3, 4)], False),
    ("beside text, sparse", [(TEXT, 0, 50), (VIDEO, 3, 5)], True),
]
batches = pytest.mark.parametrize(
    ("rows", "sparse"), [batch[1:] for batch in BATCHES], ids=[batch[0] for batch in BATCHES]
)


class Base(AttentionBackend):
    """A base backend that notes the plan with which it is asked to prepare."""

    dllm_attention = None

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def init_forward_metadata(self, forward_batch: Any) -> None: ...

    def init_forward_metadata_out_graph(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self._pevlm_plan)  # type: ignore[attr-defined]


class Backend(PevlmBackend, Base):
    pevlm_kernel = "sdpa"

    def __init__(self) -> None:
        super().__init__()
        self.pevlm_observer = Observer(log=False, metrics=False)
        self.req_to_token_pool = SimpleNamespace(req_to_token=torch.arange(200).view(2, 100))


def forward_batch(rows: Rows, mode: ForwardMode = ForwardMode.EXTEND) -> Any:
    inputs = [None if row is TEXT else SimpleNamespace(pevlm=row) for row, _, _ in rows]
    return SimpleNamespace(
        forward_mode=mode,
        mm_inputs=inputs,
        extend_prefix_lens_cpu=[prefix for _, prefix, _ in rows],
        extend_seq_lens_cpu=[length for _, _, length in rows],
        extend_prefix_lens=None,
        extend_seq_lens=None,
        req_pool_indices=torch.arange(len(rows)),
        # what the runner looks at before it asks
        global_num_tokens_cpu=None,
        batch_size=len(rows),
        input_ids=torch.zeros(8),
        input_embeds=None,
        replace_embeds=None,
        capture_hidden_mode=None,
        return_logprob=False,
        contains_mm_inputs=lambda: False,
    )


def schedule_batch(rows: Rows, mode: ForwardMode = ForwardMode.EXTEND) -> Any:
    inputs = [None if row is TEXT else SimpleNamespace(pevlm=row) for row, _, _ in rows]
    return SimpleNamespace(
        forward_mode=mode,
        reqs=[SimpleNamespace(multimodal_inputs=given) for given in inputs],
        prefix_lens=[prefix for _, prefix, _ in rows],
        extend_lens=[length for _, _, length in rows],
        input_embeds=None,
        replace_embeds=None,
        return_logprob=False,
        multimodal_inputs=None,
        batch_size=lambda: len(rows),
    )


def wrapped(backend: Any) -> Any:
    """In SGLang's wrapper for another decode backend, as the plugin leaves it."""
    from pevlm_sglang import plugin

    hybrid = HybridAttnBackend.__new__(HybridAttnBackend)
    hybrid.prefill_backend = backend
    plugin.pass_on_vetoes(hybrid)
    return hybrid


def runner(monkeypatch: pytest.MonkeyPatch, backend: Any) -> PrefillCudaGraphRunner:
    """SGLang's runner, as far as it asks a backend: its own conditions all hold."""
    made: Any = PrefillCudaGraphRunner.__new__(PrefillCudaGraphRunner)
    base = PrefillCudaGraphRunner.__mro__[1]
    stop = RuntimeError("enough")

    def no_more(self: Any, model_runner: Any) -> None:
        self.model_runner = model_runner

    class Enough(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            raise stop

    monkeypatch.setattr(base, "__init__", no_more)
    monkeypatch.setattr(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.get_schedule",
        lambda: SimpleNamespace(enable_mixed_chunk=False),
    )
    with pytest.raises(RuntimeError, match="enough"):
        made.__init__(Enough(attn_backend=backend))
    made.max_context_size = made.max_seq_len = None
    made.enable_lora = False
    monkeypatch.setattr(PrefillCudaGraphRunner, "_has_inactive_dp_rank", lambda *_: False)
    monkeypatch.setattr(PrefillCudaGraphRunner, "can_replay_locally", lambda *_, **__: True)
    return made


@pytest.mark.parametrize("hybrid", [False, True])
@batches
def test_runner_replays_what_is_dense(
    monkeypatch: pytest.MonkeyPatch, rows: Rows, sparse: bool, hybrid: bool
) -> None:
    backend = wrapped(Backend()) if hybrid else Backend()
    asking = runner(monkeypatch, backend)
    assert asking.can_run_graph(forward_batch(rows)) != sparse
    assert asking.can_run_graph(forward_batch(rows, ForwardMode.MIXED)) != sparse


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED])
@batches
def test_ranks_vote_for_what_is_dense(
    monkeypatch: pytest.MonkeyPatch, rows: Rows, sparse: bool, hybrid: bool, mode: ForwardMode
) -> None:
    backend = wrapped(Backend()) if hybrid else Backend()
    vote = dp_attn._local_prefill_cuda_graph_vote(
        local_batch=schedule_batch(rows, mode),
        num_tokens=8,
        prefill_graph_runner=runner(monkeypatch, backend),
        coordinated_prefill=True,
        breakable_prefill=True,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        model_config=None,
    )
    assert vote != sparse


@batches
def test_eager_forwards_have_a_plan_where_they_are_sparse(rows: Rows, sparse: bool) -> None:
    backend = Backend()
    backend.init_forward_metadata(forward_batch(rows))
    assert (backend._pevlm_plan is not None) == sparse


def test_other_modes_are_not_vetoed() -> None:
    for mode in (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.IDLE):
        assert Backend().can_run_prefill_cuda_graph(forward_batch([(VIDEO, 0, 8)], mode))


def test_graph_knows_no_plan_of_the_forward_before() -> None:
    """Its layers are captured once; a plan would be read while they are."""
    backend = Backend()
    backend.init_forward_metadata(forward_batch([(VIDEO, 0, 20)]))
    assert backend._pevlm_plan is not None
    backend.init_forward_metadata_out_graph(forward_batch([(TEXT, 0, 8)]), in_capture=True)
    assert backend.seen == [None]
