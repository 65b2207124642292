"""`natgrad train`: every optimizer on one task, from one start on the same batches, and the files left."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import natgrad
from natgrad.cli.tasks.task import Data, Task
from natgrad.cli.training.contenders import CONTENDERS, Setup
from natgrad.cli.training.display import Display
from natgrad.cli.training.files import write_whole
from natgrad.cli.training.report import draw_curves
from natgrad.cli.training.runs import Run, best
from natgrad.cli.training.training import Budget, train
from natgrad.cli.training.workers import Workers
from natgrad.optim import journal


@dataclass
class Comparison:
    """What is compared, and what has come of it so far.

    Args:
        task, data: the problem.
        optimizers: names from `CONTENDERS`. The leader, whose model is kept, is natgrad where it takes part,
            else the first.
        budget: of each run.
        seed: of the initialisation and of the order of the data, the same for every run.
        init: name of the initialisation.
        out: a folder that can be written.
        crew: the processes that do each run together; the first one writes.
    """

    task: Task
    data: Data
    optimizers: Sequence[str]
    budget: Budget
    seed: int
    init: str
    out: Path
    crew: Workers = field(default_factory=Workers)
    runs: list[Run] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    @property
    def leader(self) -> str:
        return "natgrad" if "natgrad" in self.optimizers else self.optimizers[0]

    def planned(self) -> list[Run]:
        """The runs to do, in order: each optimizer at each rate of its sweep, or once."""
        return [
            Run(name, rate)
            for name in self.optimizers
            for rate in (self.task.rates[name] if CONTENDERS[name].swept else (None,))
        ]

    def describe(self, name: str) -> str:
        """What is run under this name, in words."""
        contender = CONTENDERS[name]
        if not contender.swept:
            return contender.summary
        rates = ", ".join(f"{rate:g}" for rate in self.task.rates[name])
        return f"{contender.summary}, best of the rates {rates} with a cosine to zero"

    def execute(self, display: Display) -> None:
        """Do every run; whatever is finished is on disk when the next one starts."""
        self._warm_up()
        with display:
            for run in self.planned():
                self.runs.append(run)
                model = self.task.build(self.seed, self.init)
                display.begin(run)
                setup = self._train(model, run, self.budget, display)
                if run.optimizer == self.leader and run in best(self.runs):
                    self._keep(model, setup, run)
                self.write_log()
                display.end(run)  # last: who reads that a run is over finds its files

    def _train(self, model: nn.Module, run: Run, budget: Budget, display: Display) -> Setup:
        contender = CONTENDERS[run.optimizer]
        return train(self.task, self.data, model, contender, run, budget, self.seed, display.show, self.crew)

    def _warm_up(self) -> None:
        """Two steps of each optimizer, thrown away: what PyTorch loads on first use is on nobody's clock."""
        for run in {run.optimizer: run for run in self.planned()}.values():
            throwaway = Run(run.optimizer, run.rate)
            contender = CONTENDERS[run.optimizer]
            model = self.task.build(self.seed, self.init)
            few = Budget(None, 2)
            train(self.task, self.data, model, contender, throwaway, few, self.seed, lambda *_: None, self.crew)

    def edges(self) -> list[str]:
        """Optimizers whose best rate is the first or last of their sweep: a wider one might find a better."""
        return [
            run.optimizer
            for run in best(self.runs)
            if run.rate is not None
            and run.rate in (self.task.rates[run.optimizer][0], self.task.rates[run.optimizer][-1])
        ]

    # files ---------------------------------------------------------------------------------------------

    def write_log(self) -> None:
        """log.jsonl: a line about the comparison, then one for each evaluation of each run."""
        header = {
            "task": self.task.name,
            "optimizers": {name: self.describe(name) for name in self.optimizers},
            "data": self.data.source,
            "measured": self.task.measured,
            "budget": str(self.budget),
            "seed": self.seed,
            "init": self.init,
            "batch_size": self.task.batch_size,
            "processes": self.crew.size,
            "natgrad": natgrad.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        records = [header, *(record for run in self.runs for record in run.lines(self.seed))]
        text = "".join(json.dumps(record) + "\n" for record in records)
        self._write("log.jsonl", lambda path: path.write_text(text, encoding="utf-8"))

    def write_picture(self) -> None:
        """curves.png."""
        size = sum(p.numel() for p in self.task.build(self.seed, self.init).parameters())
        title = f"{self.task.name}: {size:,} parameters, batches of {self.task.batch_size}, seed {self.seed}"
        self._write("curves.png", lambda path: draw_curves(path, self.runs, self.leader, title, self.task.measured))

    def _keep(self, model: nn.Module, setup: Setup, run: Run) -> None:
        """model.safetensors, and metric.safetensors and info.jsonl where the optimizer has a metric."""
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        self._write("model.safetensors", lambda path: path.write_bytes(save(weights)))
        if setup.metric is not None:
            self._write("metric.safetensors", setup.metric.save)
            text = "".join(json.dumps(record) + "\n" for record in run.journal)
            self._write(journal.NAME, lambda path: path.write_text(text, encoding="utf-8"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        if not self.crew.leads:
            return
        path = write_whole(self.out / name, write)
        if path not in self.written:
            self.written.append(path)
