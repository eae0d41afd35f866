"""The hooks that speak for more than one rank or request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from pevlm_sglang import plugin


@pytest.mark.parametrize("tensor", range(2))
@pytest.mark.parametrize("pipeline", range(2))
def test_one_rank_of_a_replica_counts(tensor: int, pipeline: int) -> None:
    """Each pipeline rank runs every prompt: two that count would count all of it twice."""
    ranks = SimpleNamespace(attn_tp_rank=tensor, pp_rank=pipeline)
    assert plugin.is_first_rank(ranks) == (tensor == pipeline == 0)


REPORT = {"sink_frames": 16}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([REPORT, REPORT], REPORT),
        ([REPORT, None], None),
        ([None, REPORT], None),
        ([None, None], None),
        ([], None),
    ],
)
def test_controller_speaks_for_all_replicas_or_none(reports: list[Any], expected: Any) -> None:
    """One replica without PEVLM would answer its share of the requests with full attention."""
    infos = [{"pevlm": report} if report else {} for report in reports]
    info: dict[str, Any] = {}
    plugin._after_controller_init_info(info, SimpleNamespace(_scheduler_init_infos=infos))
    assert info.get("pevlm") == expected


@pytest.mark.parametrize("retracted", [False, True])
def test_retracted_request_keeps_its_layout(
    retracted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its placeholders are pad values by now, and it goes on where it was; but what it held of the
    vision tower is given back in any case."""
    queued, released = [], []
    monkeypatch.setattr(plugin.requests, "on_queued", lambda req, *_: queued.append(req))
    serving = SimpleNamespace(
        holder=SimpleNamespace(release=released.append), rule=None, forward_tokens=None
    )
    monkeypatch.setattr(plugin._Process, "serving", serving)
    req = SimpleNamespace(multimodal_inputs="inputs")
    plugin._before_add_request_to_queue(None, req, is_retracted=retracted)
    assert released == ["inputs"]
    assert queued == ([] if retracted else [req])


@pytest.mark.parametrize("decoding", [None, [], ["a", "b"]])
def test_decode_rows_are_those_of_the_batch_at_hand(
    decoding: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang leaves None where a batch mixes nothing; those of the batch before are gone then."""
    observer = SimpleNamespace(decode_rows=7)
    monkeypatch.setattr(plugin._Process, "serving", SimpleNamespace(observer=observer))
    plugin._after_forward_batch(None, object, SimpleNamespace(decoding_reqs=decoding))
    assert observer.decode_rows == len(decoding or [])


UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


@pytest.mark.parametrize(
    "event",
    [
        "managers.scheduler.Scheduler.flush_cache",
        *(
            f"{UPDATER}.update_weights_from_{way}"
            for way in ("disk", "distributed", "tensor", "ipc")
        ),
        f"{UPDATER}.release_memory_occupation",
    ],
)
def test_embeddings_do_not_outlive_their_weights(
    event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[bool] = []
    holder = SimpleNamespace(forget=lambda: forgotten.append(True))
    monkeypatch.setattr(plugin._Process, "serving", SimpleNamespace(holder=holder))
    plugin._HOOKS[f"sglang.srt.{event}"].function(None)
    assert forgotten == [True]
