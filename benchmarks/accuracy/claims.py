"""What the paper says, as differences that the answers of any weights can be held to.

A claim is a number that the paper finds to be above 0, mostly a weighted sum of accuracies. Nothing
here knows how it comes out; what it means if it does not is printed only then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accuracy.answers import Answers, holm

LEVEL = 0.05


@dataclass(frozen=True, eq=False)  # so that a claim can be a key
class Claim:
    """Attributes:
    says: the paper.
    weights: method → weight of its accuracy; they sum to 0.
    otherwise: what it means where it is not reproduced.
    """

    says: str
    weights: Mapping[str, float] = field(default_factory=dict)
    otherwise: str = ""


def better(says: str, one: str, other: str, otherwise: str = "") -> Claim:
    """That a method is above another."""
    return Claim(says, {one: 1, other: -1}, otherwise)


def tested(claims: Sequence[Claim], answers: Answers) -> list[dict[str, Any]]:
    """Each claim with its difference and ``verdict``, as in :func:`judged`."""
    return judged(claims, [answers.contrast(claim.weights) for claim in claims])


def judged(claims: Sequence[Claim], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each claim ``says``, ``otherwise``, what was found, and ``verdict``.

    Args:
        found: ``difference``, ``interval`` and ``p_value`` of each. ``p_holm`` is adjusted for all
            of them together, and decides.
    """
    adjusted = holm([one["p_value"] for one in found])
    return [
        {
            "says": claim.says,
            "otherwise": claim.otherwise,
            **{name: one[name] for name in ("difference", "interval", "p_value")},
            "p_holm": p,
            "verdict": verdict(one["difference"], p),
        }
        for claim, one, p in zip(claims, found, adjusted, strict=True)
    ]


def verdict(difference: float, p: float) -> str:
    """``reproduced``, ``the opposite``, or ``not decided``."""
    if p >= LEVEL or not difference:
        return "not decided"
    return "reproduced" if difference > 0 else "the opposite"
