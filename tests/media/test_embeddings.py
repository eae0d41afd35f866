"""embeddings.py: on SGLang's own embedding routine, one run of the tower a video, then freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.media import embeddings
from pevlm_sglang.media.embeddings import EmbeddingHolder
from pevlm_sglang.observe.observer import Observer

mm_schedule = pytest.importorskip("sglang.srt.managers.mm_schedule")
mm_utils = pytest.importorskip("sglang.srt.managers.mm_utils")
schedule_batch = pytest.importorskip("sglang.srt.managers.schedule_batch")

HIDDEN, LEVELS, PIXELS = 4, 2, 3
VOCABULARY = 10
MEGABYTE = 1024 * 1024
TABLE = torch.nn.Embedding(VOCABULARY, HIDDEN).requires_grad_(False)
WEIGHT = torch.randn(PIXELS, HIDDEN * (1 + LEVELS), generator=torch.Generator().manual_seed(0))


@dataclass
class Model:
    """What the routine asks of a model, with a tower that records its runs.

    Attributes:
        deepstack: whether an embedding is ``1 + LEVELS`` times as wide as a hidden state.
        one_buffer: whether every run of the tower overwrites the result of the one before, as
            SGLang's vision CUDA graphs do.
        parts: whether a run returns a tensor an item in place of one.
        runs: the items of each run.
    """

    deepstack: bool = False
    one_buffer: bool = False
    parts: bool = False
    runs: list[list[Any]] = field(default_factory=list)
    deepstack_visual_indexes: tuple[int, ...] = tuple(range(LEVELS))

    def __post_init__(self) -> None:
        self.buffer = torch.empty(1000, WEIGHT.shape[1])

    def get_video_feature(self, items: list[Any]) -> torch.Tensor | list[torch.Tensor]:
        self.runs.append(items)
        encoded = self.encode(torch.cat([item.feature for item in items]))
        if self.one_buffer:
            self.buffer[: len(encoded), : encoded.shape[1]] = encoded
            encoded = self.buffer[: len(encoded), : encoded.shape[1]]
        return list(encoded.split([len(item.feature) for item in items])) if self.parts else encoded

    get_image_feature = get_video_feature

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels @ (WEIGHT if self.deepstack else WEIGHT[:, :HIDDEN])

    def separate_deepstack_embeds(
        self, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return embedding[:, :HIDDEN], embedding[:, HIDDEN:]


@dataclass
class Medium:
    """A video or image; ``runs`` are the lengths of its ranges of tokens, one token apart."""

    runs: Sequence[int]
    modality: str = "VIDEO"
    identity: int | None = None  # media of the same one are the same


@dataclass
class Request:
    """A prompt of media with three tokens of text around each.

    Attributes:
        inputs: SGLang's ``MultimodalInputs``.
        ids: with pad values, as the scheduler has them.
    """

    inputs: Any
    ids: list[int]

    @classmethod
    def of(cls, *media: Medium) -> Request:
        items, ids = [], [1, 2, 3]
        for number, medium in enumerate(media):
            offsets = []
            for length in medium.runs:
                offsets.append((len(ids), len(ids) + length - 1))
                ids += [0] * length + [4]
            identity = medium.identity
            if identity is None:
                identity = next(_identities)
            item = schedule_batch.MultimodalDataItem(
                modality=schedule_batch.Modality[medium.modality],
                offsets=offsets,
                feature=torch.randn(
                    sum(medium.runs), PIXELS, generator=torch.Generator().manual_seed(identity)
                ),
            )
            item.set_hash(identity)
            for start, end in offsets:
                ids[start : end + 1] = item.padding_sequence(end - start + 1)
            items.append(item)
            ids += [5, 6, 7 + number % 3]
        return cls(schedule_batch.MultimodalInputs(mm_items=items), ids)

    def expected(self, model: Model) -> tuple[torch.Tensor, torch.Tensor]:
        """What the language model must get: hidden states and deepstack, a row a token."""
        rows = TABLE(torch.tensor(self.ids).clamp(0, VOCABULARY - 1))
        rows = torch.cat([rows, torch.zeros(len(rows), HIDDEN * LEVELS)], dim=1)
        for item in self.inputs.mm_items:
            encoded = model.encode(item.feature)
            at = 0
            for start, end in item.offsets:
                rows[start : end + 1, : encoded.shape[1]] = encoded[at : at + end + 1 - start]
                at += end + 1 - start
        return rows[:, :HIDDEN], rows[:, HIDDEN:]


def _count() -> Iterator[int]:
    number = 1000
    while True:
        yield (number := number + 1)


_identities = _count()


class Scheduler:
    """Runs forwards through SGLang's ``embed_mm_inputs`` and checks what each of them embeds."""

    def __init__(self, model: Model, holder: EmbeddingHolder) -> None:
        self.model = model
        self.holder = holder

    def forward(self, *rows: tuple[Request, int, int]) -> None:
        """One batch of (request, prefix, end)."""
        use_deepstack = {}
        if self.model.deepstack:
            use_deepstack = dict.fromkeys(schedule_batch.Modality.all(), True)
        embedded, other = mm_utils.embed_mm_inputs(
            mm_inputs_list=[request.inputs for request, _, _ in rows],
            extend_prefix_lens=[prefix for _, prefix, _ in rows],
            extend_seq_lens=[end - prefix for _, prefix, end in rows],
            input_ids=torch.tensor([i for r, prefix, end in rows for i in r.ids[prefix:end]]),
            input_embedding=TABLE,
            multimodal_model=self.model,
            use_deepstack=use_deepstack,
        )
        expected = [request.expected(self.model) for request, _, _ in rows]
        hidden, deepstack = (
            torch.cat(
                [e[i][prefix:end] for e, (_, prefix, end) in zip(expected, rows, strict=True)]
            )
            for i in range(2)
        )
        torch.testing.assert_close(embedded, hidden)
        if self.model.deepstack:
            torch.testing.assert_close(other["input_deepstack_embeds"], deepstack)

    def prefill(self, request: Request, chunk: int, hit: int = 0) -> list[int]:
        """A request alone, on a prefix hit; returns the bytes held after each chunk."""
        held = []
        for start in range(hit, len(request.ids), chunk):
            self.forward((request, start, min(start + chunk, len(request.ids))))
            held.append(self.holder.num_bytes)
        return held


Start = Callable[..., Scheduler]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a scheduler; everything that is patched is put back after the test."""
    for owner, name in (
        (mm_utils, "embed_mm_inputs"),
        (mm_utils, "get_embedding_and_mask"),
        (mm_schedule, "_get_chunked_embedding_full"),
        (mm_schedule, "embedding_cache"),
        (schedule_batch.MultimodalInputs, "release_features"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))

    def build(
        model: Model | None = None, *, cache_bytes: int = 0, upstream: bool = False
    ) -> Scheduler:
        mm_schedule.init_mm_embedding_cache(cache_bytes)
        holder = EmbeddingHolder(Observer(log=False, metrics=False))
        if upstream:
            embeddings.observe_runs(holder.observer)
        else:
            embeddings.install(holder)
        return Scheduler(model or Model(), holder)

    return build


SHAPES = {
    "one range": [Medium([40])],
    "a range a frame": [Medium([5] * 8)],
    "two videos": [Medium([40]), Medium([30])],
    "two videos, a range a frame": [Medium([5] * 8), Medium([3] * 7)],
    "two videos in an item": [Medium([40, 30])],
    "video and images": [Medium([9], "IMAGE"), Medium([5] * 8), Medium([11], "IMAGE")],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 1000])
@pytest.mark.parametrize("cache_bytes", [0, 700, MEGABYTE])
@pytest.mark.parametrize("deepstack", [False, True])
def test_one_run_an_item(
    start: Start, shape: str, chunk: int, cache_bytes: int, deepstack: bool
) -> None:
    scheduler = start(Model(deepstack), cache_bytes=cache_bytes)
    request = Request.of(*SHAPES[shape])
    held = scheduler.prefill(request, chunk)
    encoded = [item for run in scheduler.model.runs for item in run]
    assert sorted(map(id, encoded)) == sorted(map(id, request.inputs.mm_items))
    assert held[-1] == 0
    assert (max(held) > 0) == (chunk < 40)
    totals = scheduler.holder.observer.totals
    assert (totals.vision_runs, totals.vision_items) == (len(scheduler.model.runs), len(encoded))
    assert totals.vision_seconds > 0


def test_upstream_runs_again_and_is_counted(start: Start) -> None:
    """What this file is about."""
    scheduler = start(upstream=True)
    scheduler.prefill(Request.of(Medium([40])), 10)
    assert len(scheduler.model.runs) == 5
    assert scheduler.holder.observer.describe()["vision_runs"] == 5
    assert scheduler.holder.num_bytes == 0


@pytest.mark.parametrize("shape", ["two videos", "two videos, a range a frame"])
def test_prefix_hit(start: Start, shape: str) -> None:
    """Nothing runs for a video that the hit covers, and once what it cuts."""
    scheduler = start()
    request = Request.of(*SHAPES[shape])
    first, second = request.inputs.mm_items
    for hit, items in (
        (len(request.ids) - 2, []),
        (second.offsets[-1][1] + 1, []),
        (second.offsets[-1][1], [second]),
        (second.offsets[0][0] + 4, [second]),
        (first.offsets[-1][1] + 1, [second]),
        (first.offsets[-1][1], [first, second]),
        (first.offsets[0][0] + 1, [first, second]),
    ):
        scheduler.model.runs.clear()
        scheduler.prefill(request, 8, hit)
        assert [item for run in scheduler.model.runs for item in run] == items, hit


def test_freed_after_its_last_chunk(start: Start) -> None:
    scheduler = start()
    request = Request.of(Medium([40]))
    scheduler.forward((request, 0, 20))
    [result] = scheduler.holder.held([request.inputs]).values()
    embedding = weakref.ref(result.embedding)
    del result
    assert scheduler.holder.num_bytes == 40 * HIDDEN * 4
    scheduler.forward((request, 20, 43))  # up to the end of the video, text to come
    assert embedding() is None
    assert scheduler.holder.num_bytes == 0
    scheduler.forward((request, 43, len(request.ids)))
    assert len(scheduler.model.runs) == 1


def test_only_a_cut_request_holds(start: Start) -> None:
    """A queue of long videos: what waits holds nothing, what is done neither."""
    scheduler = start()
    queue = [Request.of(Medium([40])) for _ in range(50)]
    for number, request in enumerate(queue):
        assert scheduler.holder.num_bytes == 0
        scheduler.forward((request, 0, 30))
        assert scheduler.holder.num_bytes == 40 * HIDDEN * 4
        following = queue[number + 1 : number + 2]
        scheduler.forward((request, 30, len(request.ids)), *((r, 0, 3) for r in following))
    assert len(scheduler.model.runs) == 50


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_queue(start: Start, data: st.DataObject) -> None:
    """Chunks as SGLang's scheduler makes them: the request that was cut first, then from the queue
    what a budget of tokens lets in; whatever the cache holds, each item runs once."""
    kinds = st.sampled_from(["VIDEO", "VIDEO", "IMAGE"])
    runs = st.lists(st.integers(1, 12), min_size=1, max_size=5)
    media = st.lists(st.builds(Medium, runs, kinds), min_size=1, max_size=3)
    requests = [Request.of(*m) for m in data.draw(st.lists(media, min_size=1, max_size=5))]
    hits = [data.draw(st.integers(0, len(request.ids) - 1)) for request in requests]
    budget = data.draw(st.integers(1, 60))
    model = Model(deepstack=data.draw(st.booleans()))
    scheduler = start(model, cache_bytes=data.draw(st.sampled_from([0, 300, MEGABYTE])))
    queue = list(zip(requests, hits, strict=True))
    while queue:
        batch, left = [], budget
        while queue and left:
            request, prefix = queue.pop(0)
            end = min(prefix + left, len(request.ids))
            left -= end - prefix
            batch.append((request, prefix, end))
        request, _, end = batch[-1]
        if end < len(request.ids):
            queue.insert(0, (request, end))
        scheduler.forward(*batch)
    needed = [
        item
        for request, hit in zip(requests, hits, strict=True)
        for item in request.inputs.mm_items
        if item.offsets[-1][1] >= hit
    ]
    encoded = [item for run in scheduler.model.runs for item in run]
    assert sorted(map(id, encoded)) == sorted(map(id, needed))
    assert scheduler.holder.num_bytes == 0


@pytest.mark.parametrize("runs", [[40], [5] * 8])
def test_same_video_of_two_requests(start: Start, runs: list[int]) -> None:
    """In one batch they share a run, and what a request holds serves the one that joins it."""
    scheduler = start()
    first, second, third = (Request.of(Medium(runs, identity=7)) for _ in range(3))
    scheduler.forward((first, 0, 30), (second, 0, 30))
    assert len(scheduler.model.runs) == 1
    assert scheduler.holder.num_bytes == 40 * HIDDEN * 4
    length = len(first.ids)
    scheduler.forward((first, 30, length), (second, 30, length), (third, 0, 20))
    scheduler.forward((third, 20, length))
    assert len(scheduler.model.runs) == 1
    assert scheduler.holder.num_bytes == 0


def test_two_cut_requests_of_a_batch(start: Start) -> None:
    """Each finds its own, whatever its place in the batch."""
    scheduler = start()
    first, second = (Request.of(Medium([40])) for _ in range(2))
    scheduler.forward((first, 0, 30), (second, 0, 20))
    scheduler.forward((second, 20, 30), (first, 30, 40))
    scheduler.forward((first, 40, len(first.ids)), (second, 30, len(second.ids)))
    assert len(scheduler.model.runs) == 1  # both in one


def test_a_cut_just_before_a_video_holds_nothing(start: Start) -> None:
    """Though a neighbour of the batch has encoded it."""
    scheduler = start()
    first, second = (Request.of(Medium([40], identity=11)) for _ in range(2))
    scheduler.forward((first, 0, 30), (second, 0, 3))
    assert scheduler.holder.held([second.inputs]) == {}
    assert len(scheduler.holder.held([first.inputs])) > 0


def test_view_of_the_cache(start: Start) -> None:
    """What it admits is held as its own copy, what not as it came; what is freed is gone."""
    start(cache_bytes=40 * HIDDEN * 4)
    whole, key = torch.randn(100, HIDDEN), 5
    small, large = (mm_schedule.EmbeddingResult(embedding=part) for part in (whole[:40], whole))
    cache = mm_schedule.embedding_cache
    view = embeddings.CacheView(cache, {})
    assert view.set(key, small)
    assert view.get_single(key) is view.found[key] is cache.get_single(key) is not small
    assert not view.set(key + 1, large)
    assert view.get_single(key + 1) is large
    view = embeddings.CacheView(cache, {key: small})
    view.set(key, small)  # known by now
    assert view.found[key] is cache.get_single(key)
    assert view.free(key, None)
    assert view.get_single(key) is cache.get_single(key) is None
    assert not view.free(key, None)


class Qwen3VLForConditionalGeneration(Model):
    """By the name of its class, SGLang leaves it to move the pixels."""


@pytest.mark.parametrize("kind", [Model, Qwen3VLForConditionalGeneration])
def test_the_tower_is_known_by_its_model(
    start: Start, kind: type[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_skip = mm_schedule._can_skip_pre_embed_feature_move
    asked = []
    monkeypatch.setattr(
        mm_schedule,
        "_can_skip_pre_embed_feature_move",
        lambda method: asked.append(may_skip(method)) or asked[-1],
    )
    scheduler = start(kind())
    scheduler.prefill(Request.of(Medium([40])), 16)
    assert set(asked) == {kind is not Model}


def test_upstream_cache_serves_repeats_of_what_fits(start: Start) -> None:
    scheduler = start(cache_bytes=MEGABYTE)
    for _ in range(2):
        held = scheduler.prefill(Request.of(Medium([40], identity=8)), 16)
        assert held[-1] == 0
    assert len(scheduler.model.runs) == 1
    assert mm_schedule.embedding_cache.current_size == 40 * HIDDEN * 4


def test_eviction_from_upstream_cache_does_not_matter(start: Start) -> None:
    scheduler = start(cache_bytes=40 * HIDDEN * 4)
    long, other = Request.of(Medium([40])), Request.of(Medium([35]))
    scheduler.forward((long, 0, 20))
    mm_schedule.embedding_cache.clear()
    scheduler.forward((long, 20, 30), (other, 0, len(other.ids)))
    scheduler.forward((long, 30, len(long.ids)))
    assert len(scheduler.model.runs) == 2


def test_eviction_of_what_another_request_encoded_does_not_matter(start: Start) -> None:
    """What upstream's cache served to the first chunk is held as what was encoded for it."""
    scheduler = start(cache_bytes=MEGABYTE)
    first, again = (Request.of(Medium([40], identity=12)) for _ in range(2))
    scheduler.prefill(first, 100)
    scheduler.forward((again, 0, 20))
    mm_schedule.embedding_cache.clear()
    scheduler.forward((again, 20, len(again.ids)))
    assert len(scheduler.model.runs) == 1


@pytest.mark.parametrize("cache_bytes", [0, MEGABYTE])
def test_what_was_encoded_beside_it_is_not_held(start: Start, cache_bytes: int) -> None:
    """A run over several requests returns one tensor, of which one request needs a part."""
    scheduler = start(cache_bytes=cache_bytes)
    done, cut = Request.of(Medium([40])), Request.of(Medium([20]))
    scheduler.forward((done, 0, len(done.ids)), (cut, 0, 10))
    assert len(scheduler.model.runs) == 1
    assert scheduler.holder.num_bytes == 20 * HIDDEN * 4
    [held] = scheduler.holder.held([cut.inputs]).values()
    cached = mm_schedule.embedding_cache.get_single(cut.inputs.mm_items[0].hash)
    assert cached is (held if cache_bytes else None), "not in memory twice"


def test_end_of_a_request_releases(start: Start) -> None:
    """Aborted or finished: SGLang calls ``release_features``."""
    scheduler = start()
    request = Request.of(Medium([40]))
    scheduler.forward((request, 0, 20))
    request.inputs.release_features()
    assert request.inputs.mm_items[0].feature is None
    assert scheduler.holder.observer.kept_bytes == 0
    request.inputs.release_features()


def test_object_that_dies_releases(start: Start) -> None:
    scheduler = start()
    scheduler.forward((Request.of(Medium([40])), 0, 20))
    gc.collect()
    scheduler.holder.report()
    assert scheduler.holder.observer.kept_bytes == 0


def test_queued_again_starts_over(start: Start) -> None:
    scheduler = start()
    request = Request.of(Medium([40]))
    scheduler.forward((request, 0, 20))
    scheduler.holder.release(request.inputs)
    assert scheduler.holder.num_bytes == 0
    scheduler.prefill(request, 16)
    assert len(scheduler.model.runs) == 2
    scheduler.holder.release(None)  # a request without media


def test_another_video_of_the_same_hash(start: Start) -> None:
    """SGLang tells them apart by their length, and so does this."""
    scheduler = start()
    first, second = (Request.of(Medium([n], identity=9)) for n in (40, 30))
    scheduler.forward((first, 0, 20), (second, 0, 20))
    scheduler.forward((first, 20, len(first.ids)))
    scheduler.forward((second, 20, len(second.ids)))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("shape", ["two videos", "two videos, a range a frame"])
def test_buffer_of_a_vision_graph(
    start: Start, shape: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run overwrites what the tower returned."""
    monkeypatch.setenv("SGLANG_VIT_ENABLE_CUDA_GRAPH", "1")
    scheduler = start(Model(one_buffer=True, parts=parts))
    request = Request.of(*SHAPES[shape])
    scheduler.forward((request, 0, 30))
    scheduler.forward((request, 30, 60), (Request.of(Medium([35])), 0, 20))
    scheduler.forward((request, 60, len(request.ids)))


def test_error_in_the_tower_leaves_upstream_cache_in_place(start: Start) -> None:
    scheduler = start()
    cache = mm_schedule.embedding_cache
    request = Request.of(Medium([40]))
    request.inputs.mm_items[0].feature = None
    with pytest.raises(TypeError):
        scheduler.forward((request, 0, 20))
    assert mm_schedule.embedding_cache is cache


@pytest.mark.parametrize("seam", ["embed_mm_inputs", "get_embedding_and_mask"])
def test_missing_seam_is_refused(start: Start, seam: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mm_utils, seam)
    with pytest.raises(UnsupportedError, match=rf"no sglang\.srt\.managers\.mm_utils\.{seam}"):
        start()


def test_changed_seam_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm_utils, "embed_mm_inputs", lambda mm_inputs_list: None)
    with pytest.raises(UnsupportedError, match=r"no extend_prefix_lens, .* in .*embed_mm_inputs"):
        start()
    monkeypatch.delattr(mm_schedule.MultiModalStaticCache, "get_single")
    with pytest.raises(UnsupportedError, match="embedding cache has no get_single"):
        start()


@pytest.mark.parametrize("cache_bytes", [0, MEGABYTE])
def test_forgotten_embeddings_are_encoded_anew(start: Start, cache_bytes: int) -> None:
    """Weights change in the middle of a prefill, and before the same video comes again."""
    scheduler = start(cache_bytes=cache_bytes)
    request = Request.of(Medium([40]))
    scheduler.forward((request, 0, 20))
    scheduler.holder.forget()
    assert (scheduler.holder.num_bytes, len(mm_schedule.embedding_cache)) == (0, 0)
    scheduler.forward((request, 20, len(request.ids)))
    assert len(scheduler.model.runs) == 2
    scheduler.holder.forget()
    scheduler.prefill(Request.of(Medium([40])), 100)
    assert len(scheduler.model.runs) == 3
