"""The paper's benchmarks as lmms-eval runs them: which tasks, and which columns of Table 1.

lmms-eval aggregates a benchmark to one number. The paper splits VideoMME and LongVideoBench by the
length of the video, so the columns are computed from what lmms-eval logs of each question
(``--log_samples``): its own verdict, and the video's length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Verdict = Mapping[str, Any]
"""What a task's ``process_results`` says about one question."""


def _scored(verdict: Verdict) -> bool:
    return bool(verdict["score"] == 1)


def _all(_: Verdict) -> bool:
    return True


@dataclass(frozen=True)
class Benchmark:
    """One of lmms-eval's benchmarks.

    Attributes:
        tasks: lmms-eval's names; several are one benchmark with all their questions together.
        verdict: the key in a logged sample under which ``process_results`` left its verdict.
        columns: title in the table → which questions it holds, by their verdict.
        right: whether a verdict says that the answer was right.
    """

    tasks: tuple[str, ...]
    verdict: str
    columns: Mapping[str, Callable[[Verdict], bool]]
    right: Callable[[Verdict], bool] = _scored


# The paper's figures are multiples of 1/3600: 18 of MVBench's 20 tasks of 200 questions. Left out
# are the two whose videos are not published as video files (NTU RGB+D, and TVQA's frames).
MVBENCH = (
    *("action_antonym", "action_count", "action_localization", "action_prediction"),
    *("action_sequence", "character_order", "counterfactual_inference", "egocentric_navigation"),
    *("fine_grained_action", "moving_attribute", "moving_count", "moving_direction"),
    *("object_existence", "object_interaction", "object_shuffle", "scene_transition"),
    *("state_change", "unexpected_action"),
)

BENCHMARKS = {
    "mvbench": Benchmark(
        tasks=tuple(f"mvbench_{task}" for task in MVBENCH),
        verdict="mvbench_accuracy",
        columns={"MVBench": _all},
    ),
    "egoschema": Benchmark(
        tasks=("egoschema_subset",),  # the 500 questions whose answers are public, as in the paper
        verdict="score",
        columns={"EgoSchema": _all},
        right=lambda verdict: str(verdict["pred"]) == str(verdict["ground_truth"]),
    ),
    "videomme": Benchmark(
        tasks=("videomme",),
        verdict="videomme_perception_score",
        columns={
            "VideoMME < 2 min": lambda verdict: verdict["duration"] == "short",
            "VideoMME 2 min-1 h": lambda verdict: verdict["duration"] in ("medium", "long"),
        },
    ),
    "longvideobench": Benchmark(
        tasks=("longvideobench_val_v",),
        verdict="lvb_acc",
        columns={
            "LongVideoBench < 1 min": lambda verdict: verdict["duration_group"] in (15, 60),
            "LongVideoBench 1 min-1 h": lambda verdict: verdict["duration_group"] in (600, 3600),
        },
        right=lambda verdict: bool(verdict["answer"] == verdict["parsed_pred"]),
    ),
    "videoocr": Benchmark(
        tasks=("mme_videoocr_unjudged",),  # tasks/mme_videoocr
        verdict="videoocr_accuracy",
        columns={"MME-VideoOCR": _all},
    ),
    "made_videos": Benchmark(
        tasks=("made_videos",),  # tasks/made_videos
        verdict="made_videos_accuracy",
        columns={
            "made, 32 s": lambda verdict: verdict["frames"] == 64,
            "made, 48 s": lambda verdict: verdict["frames"] == 96,
        },
    ),
}
PAPER = tuple(name for name in BENCHMARKS if name != "made_videos")
