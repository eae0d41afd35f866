"""FlashAttention's adapter on emulated libraries, which read the metadata as the real ones do; how
``auto`` chooses; and that nothing is looked up once it has."""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention.test_plan import Batch, batches
from kernel.test_implementations import batch_call, video_batch
from kernel.test_packed import LAYOUTS, packed_call
from pevlm_kernels import (
    IMPLEMENTATIONS,
    bound,
    choice,
    chosen_implementation,
    flash,
    flash_calls,
    pevlm_prefill,
    sdpa,
)
from pevlm_kernels.flash_calls import Room
from support.emulated_kernels import (
    FLASH,
    flash_attn_4_varlen_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from support.kernel_calls import (
    Call,
    assert_within_budget,
    plain_attention,
    random_call,
    random_plan,
)
from support.lookups import recorded_lookups

AWKWARD = [(1, 1), (1, 63), (63, 63), (111, 111), (113, 203), (2, 3)]
CAPABILITIES = {2: (8, 0), 3: (9, 0), 4: (10, 0)}
"""Of a GPU on which each release of FlashAttention is taken."""


def emulate(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """A GPU with that release, on the CPU's tensors."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: CAPABILITIES[version])
    monkeypatch.setattr(flash, "is_installed", lambda module: True)
    monkeypatch.setattr(flash, "_load", FLASH.__getitem__)


@pytest.fixture(params=CAPABILITIES)
def emulated_flash(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    emulate(monkeypatch, request.param)
    return request.param


def check(call: Call, *, v_scale: float = 1.0) -> None:
    """The adapter's output and log-sum-exp against the oracle and the reference."""
    arguments = (call.q, call.k_cache, call.v_cache, call.plan)
    scales = {"softmax_scale": call.softmax_scale, "v_scale": v_scale}
    _, exact = choice.module_of("reference").prefill(*arguments, **scales)
    call_scaled = call if v_scale == 1 else _with_values(call, call.v_cache * v_scale)
    for _ in range(2):  # the second layer takes what the first derived from the plan
        out, lse = flash.prefill(*arguments, **scales)
        assert_within_budget(out, call_scaled)
        torch.testing.assert_close(lse, exact, rtol=1e-5, atol=1e-5)


def _with_values(call: Call, values: torch.Tensor) -> Call:
    return Call(call.q, call.k_cache, values, call.plan, call.mask, call.softmax_scale)


def batch_calls(dtype: torch.dtype = torch.float32) -> list[Call]:
    plan, mask = random_plan(AWKWARD, num_slots=240)
    batch = video_batch()
    slots = torch.zeros(batch.plan.total_q, batch.req_to_token.numel(), dtype=torch.bool)
    for row, visible in enumerate(batch.expected()):
        slots[row, list(visible)] = True
    return [
        random_call(plan, mask, num_q_heads=6, num_kv_heads=2, dtype=dtype),
        random_call(batch.plan, slots, num_q_heads=14, num_kv_heads=2, dtype=dtype),
    ]


@pytest.mark.usefixtures("emulated_flash")
@pytest.mark.parametrize("v_scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flash_on_paged_batches(v_scale: float, dtype: torch.dtype) -> None:
    for call in batch_calls(dtype):
        check(call.poisoned(), v_scale=v_scale)


@pytest.mark.usefixtures("emulated_flash")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_flash_on_packed_sequences(layout: tuple) -> None:
    check(packed_call(*layout))


@pytest.mark.usefixtures("emulated_flash")
@given(
    batch=batches(),
    seed=st.integers(0, 1000),
    keys=st.integers(1, 60),
    queries=st.integers(1, 20),
    entries=st.integers(1, 60),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flash_on_any_batch(batch: Batch, seed: int, keys: int, queries: int, entries: int) -> None:
    """Several requests, prefixes, text and decode rows, and little room: single sparse sequences
    of more keys and of more queries than fit, and full ones where there are no pages."""
    call = batch_call(batch, head_dim=16, seed=seed).poisoned()
    exact = plain_attention(call, torch.float64).float()
    arguments = (call.q, call.k_cache, call.v_cache, call.plan)

    def little(q: torch.Tensor, k_cache: torch.Tensor, *, paged: bool) -> Room:
        return Room(min(queries, keys), keys, paged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "room_for", little)
        patch.setattr(flash_calls, "TABLE_ENTRIES", entries)
        out, _ = flash.prefill(*arguments, softmax_scale=call.softmax_scale, v_scale=1.0)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-5)


def test_only_sparse_sequences_are_gathered(emulated_flash: int) -> None:
    (_, call) = batch_calls()
    check(call)
    ((_, calls),) = call.plan.memo.items()
    gathered = sum(len(part.slots) for part in calls if part.table is None)
    own = zip(call.plan.seqlens_k, call.plan.full, strict=True)
    sparse = sum(m for m, full in own if not full)
    assert 0 < sparse < sum(call.plan.seqlens_k)
    assert gathered == (sum(call.plan.seqlens_k) if emulated_flash == 2 else sparse)


@pytest.mark.usefixtures("emulated_flash")
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_flash_on_an_fp8_cache(stored: torch.dtype) -> None:
    for call in batch_calls():
        narrow = [cache.to(stored) for cache in (call.k_cache, call.v_cache)]
        read = [cache.to(torch.float32) for cache in narrow]
        scales = {"softmax_scale": call.softmax_scale * 0.5, "v_scale": 2.0}
        out, _ = flash.prefill(call.q, *narrow, call.plan, **scales)
        expected = Call(
            call.q, read[0] * 0.5, read[1] * 2, call.plan, call.mask, call.softmax_scale
        )
        assert_within_budget(out, expected)


@pytest.mark.usefixtures("emulated_flash")
def test_batch_order_changes_no_bit() -> None:
    batch = video_batch()
    call = batch_call(batch, num_q_heads=14, num_kv_heads=2, dtype=torch.bfloat16)
    order = [2, 0, 3, 1]
    shuffled = Batch(
        *([part[i] for i in order] for part in (batch.layouts, batch.prefix_lens)),
        *([part[i] for i in order] for part in (batch.extend_lens, batch.rows)),
        batch.req_to_token,
        batch.req_pool_indices[order],
    )
    rows = torch.arange(call.plan.total_q).split(batch.extend_lens)
    places = torch.cat([rows[i] for i in order])
    scales = {"softmax_scale": call.softmax_scale, "v_scale": 1.0}
    out, lse = flash.prefill(call.q, call.k_cache, call.v_cache, call.plan, **scales)
    again = flash.prefill(call.q[places], call.k_cache, call.v_cache, shuffled.plan, **scales)
    assert torch.equal(again[0], out[places])
    assert torch.equal(again[1], lse[:, places])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_sdpa_shapes_of_the_gpu_operators(dtype: torch.dtype, causal: bool) -> None:
    """PyTorch's shape functions for its GPU operators: heads in groups, a length of no tile."""
    q = torch.empty(37, 6, 64, dtype=dtype, device="meta")
    k = torch.empty(37 if causal else 50, 2, 64, dtype=dtype, device="meta")
    out, lse = sdpa.fused_attention(q, k, k, causal=causal, softmax_scale=0.1)
    assert (out.shape, lse.shape) == (q.shape, (6, 37))
    assert lse.dtype == torch.float32


# --- What the emulations take, the installed libraries take --------------------------------------


def parameters_in_file(package: str, file: str, function: str) -> set[str]:
    """Parameter names, from the source: neither library loads without a GPU."""
    source = Path(str(distribution(package).locate_file(file))).read_text()
    (found,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    return {argument.arg for argument in found.args.args + found.args.kwonlyargs}


@pytest.mark.parametrize(
    ("package", "file", "emulated"),
    [
        ("sglang-kernel", "sgl_kernel/flash_attn.py", flash_attn_varlen_func),
        ("sglang-kernel", "sgl_kernel/flash_attn.py", flash_attn_with_kvcache),
        ("flash-attn-4", "flash_attn/cute/interface.py", flash_attn_4_varlen_func),
    ],
)
def test_flash_arguments_exist(package: str, file: str, emulated: Callable) -> None:
    own = set(inspect.signature(emulated).parameters) - {"_unused"}
    if emulated is flash_attn_varlen_func:  # the names that it has for the other releases
        own -= {"return_lse", "return_attn_probs"}
    name = emulated.__name__.replace("_4_", "_")
    assert own <= parameters_in_file(package, file, name)
    assert {library.lse_argument for library in flash.LIBRARIES} & own


# --- The choice ----------------------------------------------------------------------------------


class OnGpu:
    """What a refusal reads of a tensor on a GPU."""

    def __init__(self, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda", 0), dtype, (9, 4, head_dim)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to have a GPU of some capability, and libraries by the start of their names."""

    def pretend(capability: tuple[int, int], *libraries: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
        for module in (flash, choice):
            monkeypatch.setattr(module, "is_installed", lambda name: name.startswith(libraries))

    return pretend


@pytest.mark.parametrize(
    ("capability", "libraries", "expected"),
    [
        ((9, 0), ("sgl_kernel", "triton"), "flash"),
        ((9, 0), ("triton",), "triton"),
        ((8, 6), ("sgl_kernel", "triton"), "triton"),
        ((8, 0), ("flash_attn.flash", "triton"), "flash"),
        ((10, 0), ("flash_attn.cute", "triton"), "flash"),
        ((9, 0), (), "sdpa"),
        ((7, 5), ("triton", "flash_attn"), "sdpa"),
    ],
)
def test_auto_goes_by_capability_and_libraries(
    machine: Callable[..., None], capability: tuple, libraries: tuple, expected: str
) -> None:
    machine(capability, *(libraries or ("nothing",)))
    tensors = (OnGpu(), OnGpu(), OnGpu())
    assert chosen_implementation(*tensors) == expected


def test_auto_goes_by_dtype_and_width(machine: Callable[..., None]) -> None:
    machine((9, 0), "sgl_kernel", "triton")
    assert chosen_implementation(*[OnGpu(dtype=torch.float32)] * 3) == "triton"
    assert chosen_implementation(*[OnGpu(head_dim=512)] * 3) == "sdpa"
    narrow = OnGpu(head_dim=64)
    assert chosen_implementation(OnGpu(), OnGpu(), narrow) == "triton"


@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)])
def test_triton_takes_what_the_gpu_can_convert(
    machine: Callable[..., None], capability: tuple, cache: torch.dtype
) -> None:
    """sm_89 is the first with instructions for e4m3; sm_80 the first with those for bfloat16."""
    machine(capability, "triton")
    reason = choice.refusal("triton", OnGpu(), OnGpu(dtype=cache), OnGpu(dtype=cache))
    if capability < (8, 0):
        assert reason == "expected a GPU of sm_80 or newer, got (7, 5)"
    elif cache == torch.float8_e4m3fn and capability < (8, 9):
        assert reason is not None
        assert "a GPU before sm_89, got float8_e4m3fn" in reason
    else:
        assert reason is None


@pytest.mark.parametrize(
    ("capability", "version"), [((8, 0), 2), ((8, 9), 2), ((9, 0), 3), ((10, 0), 4), ((12, 0), 4)]
)
def test_the_best_flash_attention_of_a_generation(
    machine: Callable[..., None], capability: tuple, version: int
) -> None:
    machine(capability, "sgl_kernel", "flash_attn")
    library = flash.library_for(capability)
    assert library is not None
    assert library.version == version


def test_auto_on_the_cpu_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    choice._log_once.cache_clear()
    caplog.set_level(logging.INFO, "pevlm_kernels")
    q = torch.zeros(3, 2, 16)
    assert [chosen_implementation(q, q, q) for _ in range(3)] == ["sdpa"] * 3
    (record,) = caplog.records
    assert record.message.startswith("impl auto takes sdpa (flash: expected tensors on a CUDA GPU")
    assert chosen_implementation(q, q, q[..., :8]) == "reference"


@pytest.mark.parametrize(
    ("impl", "capability", "error", "message"),
    [
        ("triton", (9, 0), ModuleNotFoundError, "pip install triton"),
        ("flash", (9, 0), ValueError, "pip install sglang-kernel or pip install flash-attn-4"),
        ("flash", (7, 0), ValueError, r"compute capability \(7, 0\): none exists"),
    ],
)
def test_a_missing_library_names_its_install_command(
    machine: Callable[..., None], impl: str, capability: tuple, error: type, message: str
) -> None:
    machine(capability, "nothing")
    with pytest.raises(error, match=message):
        choice.require(impl, *[OnGpu()] * 3)


@pytest.mark.parametrize("impl", [i for i in IMPLEMENTATIONS if i not in ("reference", "sdpa")])
def test_no_gpu_is_refused(impl: str) -> None:
    plan, mask = random_plan([(3, 5)], num_slots=8)
    call = random_call(plan, mask)
    with pytest.raises(ValueError, match=f"impl '{impl}': expected tensors on a CUDA GPU"):
        pevlm_prefill(call.q, call.k_cache, call.v_cache, plan, impl=impl)


# --- Nothing is looked up on a layer's path ------------------------------------------------------


@pytest.mark.parametrize("version", CAPABILITIES)
def test_a_bound_kernel_looks_nothing_up(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """From its second call on; FlashAttention-2 is found at the second name."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: CAPABILITIES[version])
    (call, _) = batch_calls(torch.bfloat16)
    took: list[list[str]] = []
    with recorded_lookups() as lookups:
        for _ in range(2):
            lookups.clear()
            assert flash.refusal(*[OnGpu()] * 3) is None
            assert bound("flash")(call.q, call.k_cache, call.v_cache, call.plan)
            took.append(list(lookups))
    assert "import_module pevlm_kernels.flash" in took[0]
    assert any(lookup.startswith("find_spec ") for lookup in took[0])
    assert not took[1]


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_the_door_looks_up_once(impl: str) -> None:
    q = torch.zeros(3, 2, 16)
    plan, _ = random_plan([(3, 3)], num_slots=3)
    with recorded_lookups() as lookups:
        pevlm_prefill(q, q, q, plan, impl=impl)
        assert lookups
        lookups.clear()
        pevlm_prefill(q, q, q, plan, impl=impl)
        assert not lookups
