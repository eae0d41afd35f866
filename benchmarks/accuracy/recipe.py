"""The training recipe: what each step of ``train.py`` does, in phases.

The phases were found by looking at the validation curve. Steps 404 to 823 trained a language model
that was thrown away; they are left out, and the step numbers, which seed the batches, stay.
"""

from __future__ import annotations

from dataclasses import dataclass

EQUAL = (1 / 7,) * 7


@dataclass(frozen=True)
class Phase:
    """A run of steps.

    Attributes:
        first, until: its steps are ``first`` to ``until - 1``; the steps seed the batches.
        what: it is for.
        scenes: shortest and longest video.
        weights: of the tasks in the order of ``questions.TASKS``.
        muon_lr, lr, embed_lr: peak learning rates of the layers' matrices, of the rest, and of the
            table of words.
        cool: the part of the phase, at its end, in which the rates fall to nothing.
        frozen_vision: the vision tower is done; train the language model on what it sees.
        restart_language: begin it anew, its words aligned with what the tower sees.
        reading: weight of the auxiliary losses.
    """

    first: int
    until: int
    what: str
    scenes: tuple[int, int]
    weights: tuple[float, ...]
    muon_lr: float
    lr: float
    embed_lr: float
    cool: float = 0.0
    frozen_vision: bool = True
    restart_language: bool = False
    reading: float = 0.3

    def rate(self, step: int) -> float:
        """The part of the peak rates at a step, 0.02 to 1."""
        warm = min(1.0, (step - self.first + 1) / 100)
        left = (self.until - step) / max(1.0, self.cool * (self.until - self.first))
        return max(0.02, min(warm, left)) if self.cool else warm


_SEE = (0.02, 1e-3, 1e-3)
_LEARN = (0.01, 3e-3, 0.01)
_FEW = (0.08, 0.1, 0.14, 0.18, 0.14, 0.16, 0.2)
_MORE = (0.04, 0.08, 0.17, 0.22, 0.3, 0.15, 0.04)
_CROSS = (0.02, 0.04, 0.06, 0.06, 0.76, 0.03, 0.03)
_ALL = (0.06, 0.18, 0.21, 0.25, 0.17, 0.11, 0.02)
_HARD = (0.03, 0.2, 0.2, 0.35, 0.09, 0.11, 0.02)
_LONG = (0.03, 0.32, 0.16, 0.34, 0.06, 0.07, 0.02)

PHASES = (
    Phase(0, 275, "the tower learns to read", (4, 6), EQUAL, *_SEE, frozen_vision=False),
    Phase(275, 404, "the same", (4, 12), EQUAL, *_SEE, frozen_vision=False),
    Phase(824, 1300, "find, time", (4, 10), _FEW, *_LEARN, restart_language=True),
    Phase(1300, 1420, "longer", (4, 20), _FEW, *_LEARN),
    Phase(1420, 2150, "order, count, occurrence", (4, 16), _MORE, *_LEARN),
    Phase(2150, 2350, "longer", (4, 32), _MORE, *_LEARN),
    Phase(2350, 2548, "longer", (4, 56), _MORE, *_LEARN),
    Phase(2548, 2879, "cross, on very short videos", (4, 8), _CROSS, 0.015, 3e-3, 0.01),
    Phase(2879, 3000, "all tasks", (4, 24), _ALL, 0.012, 3e-3, 0.01),
    Phase(3000, 5178, "all lengths", (4, 56), _HARD, *_LEARN, cool=0.4),
    Phase(5178, 6800, "count and time in long videos", (12, 56), _LONG, *_LEARN, reading=0.0),
    Phase(6800, 9000, "the same", (12, 56), _LONG, *_LEARN, reading=0.0, cool=1.0),
)


def phase_of(step: int) -> Phase | None:
    """The phase that a step belongs to, or the next one; None behind the last."""
    return next((phase for phase in PHASES if step < phase.until), None)
