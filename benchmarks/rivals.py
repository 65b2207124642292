"""The optimizers that are compared and the spaces they are tuned in.

Every rival is tuned over the same kinds of options, learning rate, weight decay, β₁ and one knob of its own, by the
same number of quasi-random (Sobol) trials, under the same warm-up and cosine. natgrad is not tuned: it runs with no
option set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import natgrad as ng

Hyper = dict[str, float]
Build = Callable[[nn.Module, nn.Module, Hyper], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Knob:
    """An option and its range, on a logarithmic scale or as a list of values."""

    name: str
    low: float = 0.0
    high: float = 0.0
    values: tuple[float, ...] = ()

    def at(self, u: float) -> float:
        """The value at `u` in [0, 1)."""
        if self.values:
            return self.values[int(u * len(self.values))]
        return self.low * (self.high / self.low) ** u


@dataclass(frozen=True)
class Rival:
    """An optimizer and its search space; one without knobs runs once with its defaults."""

    name: str
    build: Build
    knobs: tuple[Knob, ...] = ()
    scheduled: bool = True  # by warm-up and cosine
    only: tuple[str, ...] = ()  # the workloads it applies to; all where none is named
    barred: tuple[str, ...] = ()  # the workloads it cannot train, each with its reason in the comment beside it

    def applies(self, workload: str) -> bool:
        return workload not in self.barred and (not self.only or workload in self.only)

    def trial(self, number: int) -> Hyper:
        """Options of a trial: the same Sobol sequence for every workload."""
        if not self.knobs:
            return {}
        point = torch.quasirandom.SobolEngine(len(self.knobs), scramble=True, seed=0).draw(number + 1)[number]
        return {k.name: k.at(float(u)) for k, u in zip(self.knobs, point)}


DECAY = Knob("weight_decay", values=(0.0, 1e-4, 1e-3, 1e-2, 1e-1))
BETA = Knob("beta1", values=(0.8, 0.9, 0.95))


def sgd(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(model.parameters(), h["lr"], momentum=h["beta1"], nesterov=True, weight_decay=h["weight_decay"])
    ]


def adamw(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    betas = (h["beta1"], 0.999)
    return [torch.optim.AdamW(model.parameters(), h["lr"], betas, eps=h["eps"], weight_decay=h["weight_decay"])]


def nadamw(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    betas = (h["beta1"], 0.999)
    options = {"eps": h["eps"], "weight_decay": h["weight_decay"], "decoupled_weight_decay": True}
    return [torch.optim.NAdam(model.parameters(), h["lr"], betas, **options)]


def hidden(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of hidden layers, and everything else (embeddings, the last layer, vectors)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables][:-1]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def muon(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    matrices, rest = hidden(model)
    return [
        torch.optim.Muon(matrices, h["lr"], weight_decay=h["weight_decay"], momentum=h["beta1"]),
        torch.optim.AdamW(rest, h["lr"] * h["adam_share"], weight_decay=h["weight_decay"]),
    ]


def soap(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import SOAP

    betas = (h["beta1"], 0.95)
    interval = int(h["interval"])
    return [SOAP(model.parameters(), h["lr"], betas, weight_decay=h["weight_decay"], precondition_frequency=interval)]


def shampoo(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import ScalableShampoo

    betas = (h["beta1"], 0.999)
    interval = int(h["interval"])
    return [
        ScalableShampoo(
            model.parameters(), h["lr"], betas, weight_decay=h["weight_decay"], preconditioning_compute_steps=interval
        )
    ]


def schedule_free(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    from schedulefree import AdamWScheduleFree

    opt = AdamWScheduleFree(
        model.parameters(), h["lr"], (h["beta1"], 0.999), weight_decay=h["weight_decay"], warmup_steps=int(h["warmup"])
    )
    opt.train()
    return [opt]


def psgd(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    import heavyball

    heavyball.utils.compile_mode = None  # eager: compiling costs more than a run lasts
    return [
        heavyball.PSGDKron(
            model.parameters(),
            h["lr"],
            beta=h["beta1"],
            weight_decay=h["weight_decay"],
            preconditioner_update_probability=1 / h["interval"],
        )
    ]


def singd(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    """Layers that it does not support are trained by AdamW at a hundredth of the rate, as its manual proposes."""
    from singd.optim.optimizer import SINGD

    known = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    mine = [p for m in known for p in m.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in mine)]
    average = "batch+sequence" if any(isinstance(m, nn.Embedding) for m in model.modules()) else "batch"
    opts: list[torch.optim.Optimizer] = [
        SINGD(
            model,
            mine,
            lr=h["lr"],
            momentum=h["beta1"],
            damping=h["damping"],
            weight_decay=h["weight_decay"],
            loss_average=average,
            normalize_lr_cov=True,
        )
    ]
    return [*opts, torch.optim.AdamW(rest, h["lr"] / 10, weight_decay=h["weight_decay"])] if rest else opts


def lbfgs(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    history = int(h["history"])
    return [
        torch.optim.LBFGS(model.parameters(), h["lr"], history_size=history, line_search_fn="strong_wolfe", max_iter=20)
    ]


def natgrad_defaults(model: nn.Module, criterion: nn.Module, h: Hyper) -> list[torch.optim.Optimizer]:
    return [ng.NaturalGradient(ng.Fisher(model, criterion))]


def rate(low: float, high: float) -> Knob:
    return Knob("lr", low, high)


EPS = Knob("eps", 1e-10, 1e-6)
INTERVAL = Knob("interval", values=(1, 5, 10, 20))

RIVALS: dict[str, Rival] = {
    r.name: r
    for r in (
        Rival("natgrad", natgrad_defaults, scheduled=False),
        Rival("sgd", sgd, (rate(1e-3, 3.0), DECAY, BETA)),
        Rival("adamw", adamw, (rate(1e-4, 3e-2), DECAY, BETA, EPS)),
        Rival("nadamw", nadamw, (rate(1e-4, 3e-2), DECAY, BETA, EPS)),
        Rival("muon", muon, (rate(1e-3, 1e-1), DECAY, BETA, Knob("adam_share", 0.03, 1.0))),
        Rival("soap", soap, (rate(3e-4, 3e-2), DECAY, BETA, INTERVAL)),
        Rival("shampoo", shampoo, (rate(1e-4, 3e-2), DECAY, BETA, INTERVAL)),
        Rival("psgd", psgd, (rate(1e-4, 3e-2), DECAY, BETA, INTERVAL), barred=("pinn",)),  # mixes float32 into float64
        Rival(
            "singd", singd, (rate(1e-4, 1e-1), DECAY, BETA, Knob("damping", 1e-5, 1e-1)), barred=("pinn",)
        ),  # no vmap
        Rival(
            "schedule_free",
            schedule_free,
            (rate(3e-4, 1e-1), DECAY, BETA, Knob("warmup", values=(0, 20, 100))),
            scheduled=False,
        ),
        Rival(
            "lbfgs",
            lbfgs,
            (Knob("lr", 0.1, 1.0), Knob("history", values=(10, 50, 100))),
            scheduled=False,
            only=("pinn",),
        ),
    )
}


def cosine_with_warmup(share: float) -> float:
    """Factor of the learning rate after `share` of the budget: 5 % linear warm-up, then a cosine to zero."""
    warm = min(1.0, share / 0.05)
    return warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, share)))
