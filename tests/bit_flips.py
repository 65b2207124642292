"""Flip bits in the files that natgrad writes, and see each file be refused or load as what was saved.

    python -m tests.bit_flips --flips 500

One bit at a time, anywhere in a metric file, in an optimizer's state that ``torch.save`` has written, and in the files
of a checkpoint folder. What reads them has a state of its own by then, which a refusal leaves as it is to the last bit.
A bit that says nothing (padding, dates) may load as what was saved.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import natgrad as ng
from natgrad import checkpoint
from tests.training_cases import same

OUTCOMES = ("refused", "the same", "as something else", "refused and changed")


class Run:
    """A model and its optimizer after some steps."""

    def __init__(self, structure: str, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5))
        criterion = nn.CrossEntropyLoss()
        metric = ng.Fisher(self.model, criterion, structure=structure)
        self.opt = ng.NaturalGradient(metric, refresh=3, average=0.9)
        for step in range(steps):
            generator = torch.Generator().manual_seed(1000 * seed + step)
            x = torch.randn(32, 12, generator=generator)
            self.opt.zero_grad()
            criterion(self.model(x), x[:, :5].argmax(1)).backward()
            self.opt.step()

    @property
    def metric(self) -> ng.Fisher:
        return self.opt.metric  # type: ignore[return-value]

    def state(self) -> dict[str, Any]:
        return {"model": {n: p.clone() for n, p in self.model.state_dict().items()}, "opt": self.opt.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])


def save_metric(run: Run, folder: Path) -> None:
    run.metric.save(folder / "metric.safetensors")


def load_metric(run: Run, folder: Path) -> None:
    run.metric.load(folder / "metric.safetensors")


def save_optimizer(run: Run, folder: Path) -> None:
    torch.save(run.opt.state_dict(), folder / "optimizer.pt")


def load_optimizer(run: Run, folder: Path) -> None:
    run.opt.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def save_folder(run: Run, folder: Path) -> None:
    checkpoint.save({"model": run.model, "opt": run.opt, "step": 7}, folder / "step-7")


def load_folder(run: Run, folder: Path) -> None:
    found = checkpoint.load({"model": run.model, "opt": run.opt}, folder / "step-7")
    assert found == {"step": 7}


KINDS: dict[str, tuple[Callable[[Run, Path], None], Callable[[Run, Path], None]]] = {
    "metric file": (save_metric, load_metric),
    "optimizer file": (save_optimizer, load_optimizer),
    "checkpoint folder": (save_folder, load_folder),
}


def flipped(kind: str, flips: int, structure: str = "kfac", seed: int = 0) -> Counter[str]:
    """Return how often each of `OUTCOMES` came about."""
    save, load = KINDS[kind]
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about pickles that hold odd things
        folder = Path(name)
        save(Run(structure, 1, 7), folder)
        run = Run(structure, 2, 4)
        before = run.state()
        load(run, folder)
        saved = run.state()
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        sizes = [p.stat().st_size for p in files]
        for _ in range(flips):
            run.set_state(before)
            (path,) = chance.choices(files, sizes)
            whole = path.read_bytes()
            damaged, bit = bytearray(whole), chance.randrange(8 * len(whole))
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                load(run, folder)
            except Exception:
                outcomes["refused" if same(run.state(), before) else "refused and changed"] += 1
            else:
                outcomes["the same" if same(run.state(), saved) else "as something else"] += 1
            path.write_bytes(whole)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{'one bit flipped in':<20}{'structure':<12}" + "".join(f"{o:>22}" for o in OUTCOMES))
    for kind in KINDS:
        for structure in ("kfac", "ekfac"):
            found = flipped(kind, options.flips, structure, options.seed)
            print(f"{kind:<20}{structure:<12}" + "".join(f"{found[o]:>22}" for o in OUTCOMES), flush=True)


if __name__ == "__main__":
    main()
