"""requests.py: a request's configuration, its cache namespace, its layout, and its refusals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from families.test_spans import RULE, image, item, video
from pevlm_sglang.layout import Layout
from pevlm_sglang.observe.observer import RequestLayout
from pevlm_sglang.requests import lay_out, on_created, on_queued
from pevlm_sglang.settings.config import PevlmConfig

SERVER = PevlmConfig(sink_frames=2, block_frames=2)
TAG = f"pevlm:{SERVER.cache_namespace}|"


@dataclass
class Inputs:
    """The part of SGLang's ``MultimodalInputs`` that is read; a dataclass, as the real one."""

    mm_items: list = field(default_factory=list)


class Request(SimpleNamespace):
    """The part of SGLang's ``Req`` that is read."""

    def set_finish_with_abort(self, message: str) -> None:
        assert self.to_finish is None, "aborted twice"
        self.to_finish = message
        self.multimodal_inputs = None


def request(
    override: Any = None, *items: Any, extra_key: str | None = None, session: Any = None
) -> Request:
    params = None if override is None else {"pevlm": override}
    ids = [7] * 100  # text, and each item's placeholders
    for pad, medium in enumerate(items, start=1_000_000):
        medium.pad_value = pad
        for start, end in medium.offsets or ():
            ids[start : end + 1] = [pad] * (end + 1 - start)
    return Request(
        origin_input_ids=ids,
        tokenizer=None,
        sampling_params=SimpleNamespace(custom_params=params),
        extra_key=extra_key,
        session=session,
        multimodal_inputs=Inputs(list(items)) if items else None,
        to_finish=None,
    )


def serve(req: Request, server: PevlmConfig = SERVER) -> Request:
    on_created(req, server)
    on_queued(req, RULE)
    return req


def long_video(start: int = 5) -> Any:
    """Five steps of two frames and four tokens."""
    return video([(start, start + 19)], (5, 4, 4))


def expected_layout(sink: int = 2, block: int = 2) -> Layout:
    videos = RULE.spans(Inputs([long_video()]), (), image_runs=False)
    return Layout.build(videos, sink_frames=sink, block_frames=block)


# --- Configuration and namespace -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "kept"), [(None, ""), ("", ""), ("salt|lora-0123", "salt|lora-0123")]
)
def test_namespace_goes_in_front_of_the_key(old: str | None, kept: str) -> None:
    """SGLang reads LoRA ids from the key's end."""
    req = request(extra_key=old)
    on_created(req, SERVER)
    assert req.extra_key == TAG + kept
    assert req.pevlm_config == SERVER
    assert req.pevlm_error is None


def test_text_and_video_of_one_setting_share_a_namespace() -> None:
    assert serve(request()).extra_key == serve(request({}, long_video())).extra_key


def test_override_has_its_own_namespace() -> None:
    req = request({"sink_frames": 4}, extra_key="salt")
    on_created(req, SERVER)
    assert req.pevlm_config == PevlmConfig(sink_frames=4, block_frames=2)
    assert req.extra_key == f"pevlm:{req.pevlm_config.cache_namespace}|salt"
    assert req.extra_key != TAG + "salt"


@pytest.mark.parametrize("old", [None, "salt"])
@pytest.mark.parametrize("by", ["request", "server"])
def test_disabled_leaves_the_key_alone(old: str | None, by: str) -> None:
    """Its KV is that of an ordinary server."""
    server = dataclasses.replace(SERVER, enabled=by == "request")
    req = request({"enabled": False} if by == "request" else None, extra_key=old)
    on_created(req, server)
    assert req.extra_key == old


def test_request_may_enable_what_the_server_leaves_off() -> None:
    req = serve(
        request({"enabled": True}, long_video()), dataclasses.replace(SERVER, enabled=False)
    )
    assert req.extra_key.startswith("pevlm:")
    assert req.multimodal_inputs.pevlm == RequestLayout(expected_layout(), None)


@pytest.mark.parametrize("params", [SimpleNamespace(), SimpleNamespace(custom_params={"x": 1})])
def test_requests_without_an_override(params: SimpleNamespace) -> None:
    req = request()
    req.sampling_params = params
    on_created(req, SERVER)
    assert req.pevlm_config == SERVER


# --- Layout --------------------------------------------------------------------------------------


def test_layout_travels_with_the_multimodal_inputs() -> None:
    req = request({}, long_video())
    inputs = req.multimodal_inputs
    serve(req)
    assert req.multimodal_inputs is inputs
    assert inputs.pevlm == RequestLayout(expected_layout(), None)
    assert req.to_finish is None


def test_override_changes_the_layout() -> None:
    req = serve(request({"sink_frames": 3, "block_frames": 1}, long_video()))
    assert req.multimodal_inputs.pevlm.layout == expected_layout(sink=4, block=2)


def test_text_request_has_nothing_to_lay_out() -> None:
    req = serve(request())
    assert req.multimodal_inputs is None
    assert req.to_finish is None


def test_queued_again_gives_the_same() -> None:
    req = serve(request({}, long_video()))
    first = req.multimodal_inputs.pevlm
    on_queued(req, RULE)
    assert req.multimodal_inputs.pevlm == first


@pytest.mark.parametrize(
    ("items", "config", "reason"),
    [
        ([long_video()], SERVER, None),
        ([long_video()], PevlmConfig(sink_frames=2, block_frames=8), "short_video"),
        ([long_video(), image(30, 34)], PevlmConfig(), "short_video"),
        ([long_video()], dataclasses.replace(SERVER, enabled=False), "disabled"),
        ([image(0, 4), image(5, 9)], SERVER, "image_runs_off"),
        ([image(0, 4), image(5, 9)], PevlmConfig(image_runs=True), "short_video"),
        ([image(0, 4), image(5, 9)], PevlmConfig(True, 0, 1, True), None),
        ([item("AUDIO", [(0, 4)])], SERVER, "no_video"),
        ([], SERVER, "no_video"),
    ],
)
def test_reasons_for_dense(items: list, config: PevlmConfig, reason: str | None) -> None:
    found = lay_out(Inputs(items), (), RULE, config)
    assert found.dense_reason == reason
    assert (found.layout.first_sparse is None) == (reason is not None)


def test_disabled_requests_are_not_read() -> None:
    """Turning PEVLM off must serve what its rules would refuse."""
    found = lay_out(Inputs([video(None)]), (), RULE, PevlmConfig(enabled=False))
    assert found.layout == Layout()


# --- Refusals ------------------------------------------------------------------------------------


def test_bad_override_is_refused_when_it_queues() -> None:
    """Not in the constructor: an exception there would end the scheduler."""
    req = request({"sink": 1}, long_video())
    on_created(req, SERVER)
    assert req.to_finish is None
    assert req.pevlm_config == SERVER
    on_queued(req, RULE)
    assert req.to_finish.startswith("PEVLM: custom_params['pevlm']: unknown option 'sink'; valid")
    assert req.multimodal_inputs is None


def test_bad_override_of_a_text_request_is_refused() -> None:
    assert "expected int, got True" in serve(request({"sink_frames": True})).to_finish


def test_refused_request_queued_again_is_left_alone() -> None:
    req = serve(request({"sink": 1}))
    first = req.to_finish
    on_queued(req, RULE)
    assert req.to_finish == first


def test_request_that_was_refused_by_others_is_left_alone() -> None:
    req = request({"sink": 1}, video(None))
    req.to_finish, req.multimodal_inputs = "too long", None  # SGLang's abort drops the inputs
    serve(req)
    assert req.to_finish == "too long"


def test_request_that_is_ended_but_still_prefills_gets_a_layout() -> None:
    """A replaced turn of a session is ended without dropping its inputs, and prefills all the
    same."""
    req = request({}, long_video())
    req.to_finish = "replaced"
    serve(req)
    assert req.multimodal_inputs.pevlm.layout == expected_layout()


def test_next_request_is_not_affected_by_a_bad_one() -> None:
    serve(request({"sink": 1}, long_video()))
    assert serve(request({"sink_frames": 2}, long_video())).to_finish is None


def test_frames_that_cannot_be_told_apart_are_refused() -> None:
    req = serve(request({}, video([(0, 6)], (3, 4, 6))))
    assert req.to_finish.startswith("PEVLM: video of 3 steps: expected")


# --- Sessions ------------------------------------------------------------------------------------


class Session:
    """The part of SGLang's ``Session`` that is read."""

    def __init__(self, streaming: bool | None = None) -> None:
        if streaming is not None:
            self.streaming = streaming


def test_turns_of_a_session_keep_their_own_layouts() -> None:
    """SGLang hands one MultimodalInputs object to the turns of a session."""
    session, shared = Session(), Inputs([long_video()])
    turns = []
    for override in ({}, {"sink_frames": 4}):
        req = request(override, *shared.mm_items, session=session)
        req.multimodal_inputs = shared
        turns.append(serve(req))
    assert not hasattr(shared, "pevlm")
    first, second = (turn.multimodal_inputs for turn in turns)
    assert first.pevlm.layout == expected_layout()
    assert second.pevlm.layout == expected_layout(sink=4)
    assert first.mm_items is second.mm_items is shared.mm_items


@pytest.mark.parametrize("cut", [0, 12, 24])
def test_session_offset_that_cuts_its_video_is_refused(cut: int) -> None:
    """The video is inherited with its old offsets, where other text stands by now."""
    req = request({}, long_video(), session=Session())
    req.origin_input_ids = req.origin_input_ids[:cut] + [7] * 50
    assert "an offset cut short" in serve(req).to_finish


@pytest.mark.parametrize("session", [Session(), Session(streaming=False)])
def test_ordinary_sessions_may_change_the_setting(session: Session) -> None:
    for override in ({}, {"sink_frames": 4}, {"enabled": False}):
        assert serve(request(override, long_video(), session=session)).to_finish is None


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({}, {"sink_frames": 4}),
        ({}, {"enabled": False}),
        ({"enabled": False}, {}),
        ({"enabled": False}, {"enabled": True, "block_frames": 3}),
    ],
)
def test_streaming_session_keeps_its_setting(first: dict, later: dict) -> None:
    """Its KV lies outside the radix cache, where no namespace keeps the settings apart."""
    session = Session(streaming=True)
    assert serve(request(first, session=session)).to_finish is None
    assert serve(request(first, long_video(), session=session)).to_finish is None
    refused = serve(request(later, long_video(), session=session))
    assert "expected the setting of the first turn of this streaming session" in refused.to_finish
    assert serve(request(first, long_video(), session=session)).to_finish is None
    assert serve(request(later, session=Session(streaming=True))).to_finish is None


@pytest.mark.parametrize(("chunk", "refused"), [(None, True), (400_000, True), (8192, False)])
def test_too_many_keys_in_a_forward_are_refused(chunk: int | None, refused: bool) -> None:
    """Without chunks, a sink of half a million tokens seen by blocks of one step each is an index
    list of tens of GiB."""
    tokens, steps = 1000, 1000
    huge = video([(0, steps * tokens - 1)], (steps, 40, 100))
    req = request({"sink_frames": 1000, "block_frames": 2}, huge)
    on_created(req, SERVER)
    on_queued(req, RULE, chunk)
    assert (req.to_finish is not None) == refused
    if refused:
        assert "sink_frames, block_frames: expected at most 134217728 keys" in req.to_finish
