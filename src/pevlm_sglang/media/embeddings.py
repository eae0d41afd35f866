"""No step of a video is encoded twice for one prefill, however that is chunked.

SGLang encodes an item, here a clip, as a whole, and takes from the result the rows of the chunk at
hand. What it encoded stays in a cache of ``SGLANG_VLM_CACHE_SIZE_MB``: 100 MB, 14k tokens at a
hidden size of 3584 in bfloat16, or none for Qwen3-VL on large Hopper GPUs. A clip that is no longer
there is encoded again for the next chunk (sglang/srt/managers/mm_schedule.py).

Here an embedding stays with the request that its prefill has begun to use, until it has used all of
it: as an attribute of the request's ``MultimodalInputs``. So no more is held than the clip that a
chunk's end cuts, which is one in a scheduler; a request that waits, is queued again or is aborted
holds none. SGLang's own cache goes on serving repeats of what fits.

Which embedding is found depends on the batch alone, and not on when an object dies: ranks that
share a tower must agree on whether to run it.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from pevlm_sglang.errors import UnsupportedError
from pevlm_sglang.media import transport
from pevlm_sglang.observe.observer import Observer
from pevlm_sglang.seams import REMEDY, wrap

EACH_STEP_ONCE = "each step of a video is encoded once a prefill"

_ATTRIBUTE = "pevlm_embeddings"


class Held:
    """The embeddings that one request has begun to use: SGLang's ``EmbeddingResult`` by its key in
    SGLang's cache."""

    def __init__(self, results: dict[int, Any]) -> None:
        self.results = results


class EmbeddingHolder:
    """Keeps embeddings with requests, and tells the observer how many bytes that is."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._held: weakref.WeakSet[Held] = weakref.WeakSet()  # counts what is alive, keeps nothing

    @property
    def num_bytes(self) -> int:
        """Bytes of all embeddings that requests hold; one that two of them share counts once."""
        results = (result for held in self._held for result in held.results.values())
        storages = (result.embedding.untyped_storage() for result in results)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def held(self, requests: Sequence[Any]) -> dict[int, Any]:
        """What the requests (``MultimodalInputs``) of a batch hold, for all of them to use."""
        held = [vars(request)[_ATTRIBUTE] for request in requests if _ATTRIBUTE in vars(request)]
        return {key: result for each in held for key, result in each.results.items()}

    def keep(self, requests: Sequence[Any], ends: Sequence[int], found: dict[int, Any]) -> None:
        """After a forward: each request holds what it has begun and not finished.

        Args:
            requests: the ``MultimodalInputs`` of the batch.
            ends: the position up to which each of them is prefilled now.
            found: the embeddings that this forward used, by key.
        """
        for request, end in zip(requests, ends, strict=True):
            results = {
                key: _standalone(found[key])
                for item in request.mm_items
                if item.offsets and item.offsets[0][0] < end <= item.offsets[-1][1]  # inclusive
                for key in _keys(item)
                if key in found
            }
            vars(request).pop(_ATTRIBUTE, None)
            if results:
                vars(request)[_ATTRIBUTE] = held = Held(results)
                self._held.add(held)
        self.report()

    def release(self, request: Any) -> None:
        """Drop what a request (``MultimodalInputs``, or None) holds: it ended, or waits again."""
        if request is not None and vars(request).pop(_ATTRIBUTE, None) is not None:
            self.report()

    def forget(self) -> None:
        """Drop every embedding, also of SGLang's cache: the weights may be others now. A prefill
        that is under way encodes its video once more."""
        from sglang.srt.managers import mm_schedule

        if mm_schedule.embedding_cache is not None:
            mm_schedule.embedding_cache.clear()
        for held in self._held:
            held.results = {}
        self.report()

    def report(self) -> None:
        """Tell the observer; what an object that died by itself held is gone from the count."""
        self.observer.embeddings_kept(self.num_bytes)


class CacheView:
    """SGLang's embedding cache, a ``MultiModalStaticCache``, as one forward sees it.

    Args:
        found: what the requests of the batch hold, by key; every embedding that is looked up or
            encoded here is added.
    """

    def __init__(self, cache: Any, found: dict[int, Any]) -> None:
        self._cache = cache
        self.found = found

    def get(self, mm_hashes: list[int], combined_hash: int | None = None) -> Any:
        key = self._cache.combine_hashes(mm_hashes)
        return self._note(key, self._cache.get(mm_hashes, combined_hash))

    def get_single(self, mm_hash: int) -> Any:
        return self._note(mm_hash, self._cache.get_single(mm_hash))

    def set(self, mm_hash: int, embedding: Any, loc: Any = None) -> bool:
        admitted: bool = self._cache.set(mm_hash, embedding, loc)
        # The cache may have taken a copy, which then is the one to hold.
        self.found[mm_hash] = self._cache.get_single(mm_hash) if admitted else embedding
        return admitted

    def free(self, mm_hash: int, mm_embedding_allocator: Any) -> bool:
        self.found.pop(mm_hash, None)
        freed: bool = self._cache.free(mm_hash, mm_embedding_allocator)
        return freed

    def _note(self, key: int, cached: Any) -> Any:
        if cached is None:
            return self.found.get(key)
        self.found[key] = cached
        return cached


def observe_runs(observer: Observer) -> None:
    """Count and time every run of the vision tower. Runs in the scheduler.

    What a CUDA graph returns is copied: SGLang's vision graphs hand out one buffer for all videos
    of a size, so that the next run overwrites what is held of this one.

    Raises:
        UnsupportedError: this SGLang lacks the seam.
    """
    from sglang.srt.environ import envs
    from sglang.srt.managers import mm_utils

    copy = envs.SGLANG_VIT_ENABLE_CUDA_GRAPH.get()

    def wrapper(get_embedding_and_mask: Callable[..., Any]) -> Callable[..., Any]:
        def observed(*, data_embedding_func: Any, input_ids: Any, **kwargs: Any) -> Any:
            @functools.wraps(data_embedding_func)
            def run(items: list[Any]) -> Any:
                with observer.vision_run(len(items), input_ids.device):
                    result = data_embedding_func(items)
                    if not copy:
                        return result
                    many = isinstance(result, list)  # one tensor an item
                    return [part.clone() for part in result] if many else result.clone()

            # SGLang asks the method for its model (mm_schedule._can_skip_pre_embed_feature_move).
            run.__self__ = getattr(data_embedding_func, "__self__", None)  # type: ignore[attr-defined]
            return get_embedding_and_mask(data_embedding_func=run, input_ids=input_ids, **kwargs)

        return observed

    wrap(mm_utils, "get_embedding_and_mask", wrapper)


def install(holder: EmbeddingHolder) -> None:
    """Count runs of the vision tower, and hold embeddings from chunk to chunk. Runs in the
    scheduler.

    Raises:
        UnsupportedError: this SGLang lacks a seam that this needs.
    """
    from sglang.srt.managers import mm_schedule, mm_utils
    from sglang.srt.managers.schedule_batch import MultimodalInputs

    cache = mm_schedule.MultiModalStaticCache
    needed = ("combine_hashes", "get", "get_single", "set", "free", "clear")
    if missing := [name for name in needed if not hasattr(cache, name)]:
        raise UnsupportedError(
            f"this SGLang's embedding cache has no {', '.join(missing)}; {REMEDY}"
        )
    observe_runs(holder.observer)

    def keep(embed: Callable[..., Any]) -> Callable[..., Any]:
        def corrected(
            *,
            mm_inputs_list: list[Any],
            extend_prefix_lens: list[int],
            extend_seq_lens: list[int],
            **kwargs: Any,
        ) -> Any:
            upstream = mm_schedule.embedding_cache
            view = CacheView(upstream, holder.held(mm_inputs_list))
            mm_schedule.embedding_cache = view
            try:
                embedded = embed(
                    mm_inputs_list=mm_inputs_list,
                    extend_prefix_lens=extend_prefix_lens,
                    extend_seq_lens=extend_seq_lens,
                    **kwargs,
                )
            finally:
                mm_schedule.embedding_cache = upstream
            ends = [p + n for p, n in zip(extend_prefix_lens, extend_seq_lens, strict=True)]
            holder.keep(mm_inputs_list, ends, view.found)
            return embedded

        return corrected

    def release(release_features: Callable[..., Any]) -> Callable[..., Any]:
        def corrected(self: Any) -> None:
            holder.release(self)
            transport.release(release_features, self)

        return corrected

    wrap(mm_utils, "embed_mm_inputs", keep)
    wrap(mm_schedule, "_get_chunked_embedding_full", item_by_item)
    wrap(MultimodalInputs, "release_features", release)


def item_by_item(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Encode a request's items one by one, and only those that the chunk overlaps.

    Where a video has several offsets, SGLang encodes all videos of the request as one; so a chunk
    of the second, on a prefix hit that covers the first, would encode the first too.
    """

    def corrected(
        data_embedding_func: Any,
        embedding_items_per_req: list[Any],
        items_offset: list[tuple[int, int]],
        extend_prefix_len: int,
        extend_seq_len: int,
        input_ids: Any,
        device: Any,
    ) -> Any:
        import torch

        start, end = extend_prefix_len, extend_prefix_len + extend_seq_len
        chunks = []
        for item in embedding_items_per_req:
            if any(first < end and last >= start for first, last in item.offsets):
                chunk, input_ids = encode(
                    data_embedding_func,
                    [item],
                    item.offsets,
                    extend_prefix_len,
                    extend_seq_len,
                    input_ids,
                    device,
                )
                chunks.append(chunk)
        return (torch.cat(chunks) if chunks else None), input_ids

    return corrected


def _keys(item: Any) -> tuple[int, int]:
    """Under which SGLang's cache may know an item: by itself, or as the only one of its request."""
    from sglang.srt.mem_cache.multimodal_cache import MultimodalCache

    return item.hash, MultimodalCache.combine_hashes([item.hash])


def _standalone(result: Any) -> Any:
    """The same embedding in memory of its own, if it is a part of a larger tensor: it must not
    keep alive what was encoded beside it."""
    tensor = result.embedding
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return result
    return dataclasses.replace(result, embedding=tensor.clone())
