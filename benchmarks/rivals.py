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

from benchmarks.workloads import Workload

Hyper = dict[str, float]
Build = Callable[[nn.Module, Workload, Hyper], list[torch.optim.Optimizer]]


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
    """An optimizer and its search space; one without knobs is not tuned.

    `scheduled`: its rate follows `cosine_with_warmup` and is zero at the end of the budget, so that its run ends
    there. `applies`: the workloads it can be run on.
    """

    name: str
    build: Build
    knobs: tuple[Knob, ...] = ()
    scheduled: bool = True
    applies: Callable[[Workload], bool] = lambda workload: True

    def trial(self, number: int) -> Hyper:
        """Options of a trial: the same Sobol sequence for every workload."""
        if not self.knobs:
            return {}
        point = torch.quasirandom.SobolEngine(len(self.knobs), scramble=True, seed=0).draw(number + 1)[number]
        return {k.name: k.at(float(u)) for k, u in zip(self.knobs, point)}


DECAY = Knob("weight_decay", values=(0.0, 1e-4, 1e-3, 1e-2, 1e-1))
BETA = Knob("beta1", values=(0.8, 0.9, 0.95))


def sgd(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(model.parameters(), h["lr"], momentum=h["beta1"], nesterov=True, weight_decay=h["weight_decay"])
    ]


def adamw(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    betas = (h["beta1"], 0.999)
    return [torch.optim.AdamW(model.parameters(), h["lr"], betas, eps=h["eps"], weight_decay=h["weight_decay"])]


def nadamw(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    betas = (h["beta1"], 0.999)
    options = {"eps": h["eps"], "weight_decay": h["weight_decay"], "decoupled_weight_decay": True}
    return [torch.optim.NAdam(model.parameters(), h["lr"], betas, **options)]


def hidden(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of hidden layers, and everything else (embeddings, the last layer, vectors)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables][:-1]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def muon(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    """torch's Muon takes matrices alone: kernels go to AdamW, with embeddings, vectors and the last layer."""
    matrices, rest = hidden(model)
    return [
        torch.optim.Muon(matrices, h["lr"], weight_decay=h["weight_decay"], momentum=h["beta1"]),
        torch.optim.AdamW(rest, h["lr"] * h["adam_share"], weight_decay=h["weight_decay"]),
    ]


def lbfgs(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    """Where every step sees the same data; its line search takes the place of a schedule."""
    history = int(h["history"])
    options = {"history_size": history, "max_iter": 5, "line_search_fn": "strong_wolfe"}
    return [torch.optim.LBFGS(model.parameters(), h["lr"], **options)]


def psgd(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    import heavyball

    heavyball.utils.compile_mode = None
    probability = h["update_probability"]
    precision = "float64" if next(model.parameters()).dtype == torch.float64 else "float32"
    return [
        heavyball.PSGDKron(
            model.parameters(),
            h["lr"],
            beta=h["beta1"],
            weight_decay=h["weight_decay"],
            preconditioner_update_probability=probability,
            q_dtype=precision,
            storage_dtype=precision,
        )
    ]


SINGD_REST = 3e-3  # AdamW's rate for what SINGD does not cover


def singd(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    """It covers linear and convolution layers; embeddings, norms and recurrent weights go to AdamW."""
    from singd.optim.optimizer import SINGD

    covered = [p for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in covered)]
    positions = workload.train[0].dim() == 2 and not workload.train[0].is_floating_point()  # a loss over all tokens
    opt = SINGD(
        model,
        covered,
        h["lr"],
        momentum=h["beta1"],
        damping=h["damping"],
        weight_decay=h["weight_decay"],
        loss_average="batch+sequence" if positions else "batch",
        normalize_lr_cov=True,
    )
    return [opt, torch.optim.AdamW(rest, SINGD_REST, weight_decay=h["weight_decay"])] if rest else [opt]


def soap(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import SOAP

    betas = (h["beta1"], 0.95)
    interval = int(h["interval"])
    return [SOAP(model.parameters(), h["lr"], betas, weight_decay=h["weight_decay"], precondition_frequency=interval)]


def shampoo(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import ScalableShampoo

    betas = (h["beta1"], 0.999)
    interval = int(h["interval"])
    return [
        ScalableShampoo(
            model.parameters(), h["lr"], betas, weight_decay=h["weight_decay"], preconditioning_compute_steps=interval
        )
    ]


def schedule_free(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    from schedulefree import AdamWScheduleFree

    opt = AdamWScheduleFree(
        model.parameters(), h["lr"], (h["beta1"], 0.999), weight_decay=h["weight_decay"], warmup_steps=int(h["warmup"])
    )
    opt.train()
    return [opt]


def natgrad_defaults(model: nn.Module, workload: Workload, h: Hyper) -> list[torch.optim.Optimizer]:
    return [workload.natgrad(model)]


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
        Rival("psgd", psgd, (rate(1e-4, 3e-2), DECAY, BETA, Knob("update_probability", 0.03, 1.0))),
        Rival(
            "singd",
            singd,
            (rate(1e-4, 3e-1), DECAY, BETA, Knob("damping", 1e-5, 1e-1)),
            applies=lambda workload: not workload.full_batch,  # its hooks know no Laplacian
        ),
        Rival(
            "schedule_free",
            schedule_free,
            (rate(3e-4, 1e-1), DECAY, BETA, Knob("warmup", values=(0, 20, 100))),
            scheduled=False,
        ),
        Rival(
            "lbfgs",
            lbfgs,
            (rate(1e-1, 1.0), Knob("history", values=(10, 30, 100))),
            scheduled=False,
            applies=lambda workload: workload.full_batch,
        ),
    )
}
FIRST_ORDER = ("adamw", "nadamw", "sgd")


def cosine_with_warmup(share: float) -> float:
    """Factor of the learning rate after `share` of the budget: 5 % linear warm-up, then a cosine to zero."""
    warm = min(1.0, share / 0.05)
    return warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, share)))
