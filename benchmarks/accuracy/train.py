"""Train the small video model from scratch, with full attention only.

    python benchmarks/accuracy/train.py

``recipe.py`` has the phases. Resumable: it goes on from its last checkpoint, and after the last
step, or after ``--minutes``, writes ``model/`` and the curve, ``results/training.json``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.dataset import HELD_OUT_SCENES, TRAIN
from accuracy.model import (
    STEP_TOKENS,
    write_processor,
    write_tokenizer,
)
from accuracy.questions import TASKS
from accuracy.recipe import Phase, phase_of
from accuracy.trainer import IGNORED, SLOT, Trainer

# glibc otherwise gives large blocks back and faults them in again, at half the speed.
_LIBC = ctypes.CDLL("libc.so.6")
_LIBC.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
_LIBC.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
WORK_DIR = Path(__file__).resolve().parents[1] / ".cache" / "accuracy"
MODEL = Path(__file__).parent / "model"
RESULTS = Path(__file__).parent / "results"
VALIDATION_SCENES = (12, 24, 40)
VALIDATION_VIDEOS = 40
TOKENS = 4500  # a step
QUESTIONS = 12  # a video
VARIANTS = 8  # of a picture that a frozen tower has seen


def make_optimizers(trainer: Trainer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, biases and norms."""
    named = dict(trainer.model.named_parameters())
    inner = [n for n, p in named.items() if p.dim() == 2 and (".layers." in n or ".blocks." in n)]
    table = "model.language_model.embed_tokens.weight"
    outer = [p for n, p in named.items() if n not in (*inner, table)]
    outer += [*trainer.reader.parameters(), *trainer.rememberer.parameters()]
    muon = torch.optim.Muon(
        [{"params": [named[n] for n in inner], "peak": "muon_lr"}], weight_decay=0.01
    )
    adam = torch.optim.AdamW(
        [{"params": outer, "peak": "lr"}, {"params": [named[table]], "peak": "embed_lr"}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    return [muon, adam]


def set_rates(optimizers: list[torch.optim.Optimizer], phase: Phase, step: int) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = getattr(phase, group["peak"]) * phase.rate(step)


def scenes_of_step(rng: np.random.Generator, phase: Phase) -> int:
    """Length of the videos of a step."""
    shortest, longest = phase.scenes
    allowed = [n for n in range(shortest, longest + 1) if n not in HELD_OUT_SCENES]
    return int(rng.choice(allowed))


class Run:
    """A training run: what a checkpoint holds.

    Attributes:
        step: the next one.
        spent: seconds so far.
        curve: validation accuracies.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trainer = Trainer(options.work_dir, seed=options.seed, compiled=options.compile)
        self.optimizers = make_optimizers(self.trainer)
        self.step, self.spent = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.checkpoint: Path = options.work_dir / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()
        elif options.from_model:
            self.begin_from_model()

    def begin_from_model(self) -> None:
        """Go on from the committed weights and curve, without their optimizers."""
        weights = type(self.trainer.model).from_pretrained(MODEL, dtype=torch.float32)
        self.trainer.model.load_state_dict(weights.state_dict())
        done = json.loads((RESULTS / "training.json").read_text())
        self.step, self.curve = done["steps"], done["curve"]
        self.spent = float(self.curve[-1]["seconds"])

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=False)
        for name in ("model", "reader", "rememberer"):
            getattr(self.trainer, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.trainer.bank = state["bank"]
        self.step, self.spent, self.curve = state["step"], state["spent"], state["curve"]

    def save(self) -> None:
        state = {
            name: getattr(self.trainer, name).state_dict()
            for name in ("model", "reader", "rememberer")
        }
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        state["bank"] = self.trainer.bank
        state |= {"step": self.step, "spent": self.spent, "curve": self.curve}
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").rename(self.checkpoint)

    def train(self) -> None:
        """Until the last step of the recipe, or until the minutes are over."""
        start, last = time.time() - self.spent, time.time()
        log = Log()
        while phase := phase_of(self.step):
            self.step = max(self.step, phase.first)
            if phase.frozen_vision and self.trainer.bank is None:
                self.trainer.freeze_vision(self.options.seed, VARIANTS)
            if phase.restart_language and self.step == phase.first:
                self.trainer.restart_language(self.options.seed)
                self.trainer.align_words()
                self.optimizers = make_optimizers(self.trainer)
            log.add(*self.do_step(phase))
            self.step += 1
            self.spent = time.time() - start
            if self.step % 50 == 0:
                log.show(self.step, self.spent)
            over = self.spent >= self.options.minutes * 60 or phase_of(self.step) is None
            if over or time.time() - last > self.options.every:
                last = time.time()
                scores = {
                    str(2 * n): self.trainer.evaluate(n, VALIDATION_VIDEOS)
                    for n in VALIDATION_SCENES
                }
                self.curve.append(
                    {"step": self.step, "seconds": round(self.spent), "accuracy": scores}
                )
                print(json.dumps(self.curve[-1]), flush=True)
                self.save()
            if over:
                break
        export(self.trainer, self.curve, self.step, self.options.seed)

    def do_step(self, phase: Phase) -> tuple[float, np.ndarray, np.ndarray]:
        """Loss, and a question: its task and whether it was answered right."""
        trainer, seed = self.trainer, self.options.seed
        scenes = scenes_of_step(np.random.default_rng((TRAIN, seed, self.step)), phase)
        length = len(trainer.before) + scenes * STEP_TOKENS + QUESTIONS * SLOT
        videos = max(4, TOKENS // length)
        key = (TRAIN, seed, self.step, 1)
        batch = trainer.batch(key, videos, scenes, QUESTIONS, phase.weights)
        set_rates(self.optimizers, phase, self.step)
        logits, targets, reading = trainer.logits(batch, torch.Generator().manual_seed(self.step))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        for module in (trainer.model, trainer.reader, trainer.rememberer):
            module.zero_grad(set_to_none=True)
        (loss + phase.reading * reading).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        ok = ((logits.detach().argmax(-1) == targets) | (targets == IGNORED)).all(1).numpy()
        return loss.item(), batch.tasks.flatten().numpy(), ok


class Log:
    """Loss and accuracies since the last line."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.by_task = np.zeros((2, len(TASKS)))

    def add(self, loss: float, tasks: np.ndarray, ok: np.ndarray) -> None:
        self.losses.append(loss)
        self.by_task += np.stack(
            [np.bincount(tasks, weights, len(TASKS)) for weights in (ok, np.ones_like(ok))]
        )

    def show(self, step: int, seconds: float) -> None:
        right, asked = self.by_task
        rates = " ".join(
            f"{t} {r / max(n, 1):.2f}" for t, r, n in zip(TASKS, right, asked, strict=True)
        )
        print(f"{step} {seconds:.0f}s loss {np.mean(self.losses):.3f} | {rates}", flush=True)
        self.losses.clear()
        self.by_task[:] = 0


def export(trainer: Trainer, curve: list[dict[str, Any]], step: int, seed: int) -> None:
    """The model in bfloat16 with its tokenizer and processor files, and the training curve."""
    write_tokenizer(MODEL)
    write_processor(MODEL)
    trainer.model.to(torch.bfloat16).save_pretrained(MODEL)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "seed": seed,
        "steps": step,
        "what": "accuracy on validation videos by sampled frames and task",
        "curve": curve,
    }
    (RESULTS / "training.json").write_text(json.dumps(content, indent=1) + "\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=240, help="of training in all, at most")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=120, help="seconds between checkpoints")
    parser.add_argument(
        "--from-model",
        action="store_true",
        help="without a checkpoint: go on from model/ and results/training.json",
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    Run(options).train()


if __name__ == "__main__":
    main()
