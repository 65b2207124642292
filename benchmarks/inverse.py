"""Inverse problems beside Adam + L-BFGS at equal CPU time: ``python -m benchmarks.inverse [PROBLEM …] [--seconds 20]``.

Each problem has a network, points and measurements drawn by the seed, an unknown, and its error. The rival is what PINN
libraries do by default (DeepXDE: Adam at 1e-3, then L-BFGS with a history of 100 and a strong Wolfe search), half of
the time each, on the same loss and points. It gets the residuals by the same forward Laplacian over all points at once,
so that it pays for the method and not for the bookkeeping. One thread; medians over seeds, with smallest and largest.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.operators import derivatives, laplacian

F64 = torch.float64
SEEDS = (0, 1, 2)


class Setting(NamedTuple):
    metric: ng.GaussNewton
    batch: dict[str, Any]
    error: Callable[[], float]


def tanh_net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def fit(u: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return u(x) - y


def coefficient() -> Setting:
    """−k u″ = f on [0, 1], k = 2, from u at 10 points; starts at k = 0.5."""
    net, k = tanh_net(1, 20, 20, 1), nn.Parameter(torch.tensor(0.5, dtype=F64))
    x, at = torch.linspace(0, 1, 40, dtype=F64)[:, None], torch.linspace(0, 1, 10, dtype=F64)[:, None]
    terms = {"equation": lambda u, x, f: k * laplacian(u, x) + f, "measured": fit}
    batch = {"equation": (x, 2 * math.pi**2 * torch.sin(math.pi * x[:, 0])), "measured": (at, torch.sin(math.pi * at))}
    return Setting(ng.GaussNewton(net, terms, params={"k": k}), batch, lambda: abs(float(k.detach()) - 2) / 2)


VISCOSITY = 0.05  # 1 / Re of Kovasznay's flow, https://doi.org/10.1017/S0305004100023999


def kovasznay(noise: float = 0.0) -> Setting:
    """λ₁(u·∇)u + ∇p = λ₂Δu, ∇·u = 0, from velocity and pressure at 60 points; λ = (1, 0.05), starts at (0.5, 0.5).

    Without pressure the equations hold for every multiple of (λ₁, λ₂, p).
    """
    net, k = tanh_net(2, 20, 20, 3), nn.Parameter(torch.full((2,), 0.5, dtype=F64))
    a = 0.5 / VISCOSITY - math.sqrt(0.25 / VISCOSITY**2 + 4 * math.pi**2)

    def points(n: int) -> Tensor:
        return torch.rand(n, 2, dtype=F64) * torch.tensor([1.5, 2.0], dtype=F64) - 0.5

    def flow(x: Tensor) -> Tensor:
        """(u, v, p)"""
        grown, turned = torch.exp(a * x[:, 0]), 2 * math.pi * x[:, 1]
        u, v = 1 - grown * torch.cos(turned), a / (2 * math.pi) * grown * torch.sin(turned)
        return torch.stack([u, v, 0.5 * (1 - grown**2)], dim=1)

    def equation(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        value, slope, bend = derivatives(u, x)  # (3,), (2, 3), (3,) of (u, v, p)
        momentum = k[0] * value[:2] @ slope[:, :2] + slope[:, 2] - k[1] * bend[:2]
        return torch.cat([momentum, (slope[0, 0] + slope[1, 1])[None]])

    at = points(60)
    measured = flow(at)
    measured = measured + noise * measured.std(0) * torch.randn_like(measured)
    terms = {"equation": equation, "measured": fit}
    right = torch.tensor([1.0, VISCOSITY], dtype=F64)
    return Setting(
        ng.GaussNewton(net, terms, params={"coefficients": k}),
        {"equation": points(200), "measured": (at, measured)},
        lambda: float(((k.detach() - right) / right).abs().max()),
    )


def source() -> Setting:
    """−Δu = f on the unit square, f a network of its own, from u at 200 points."""
    net, f = tanh_net(2, 32, 32, 1), tanh_net(2, 24, 24, 1)
    x, at, grid = torch.rand(300, 2, dtype=F64), torch.rand(200, 2, dtype=F64), torch.rand(2000, 2, dtype=F64)
    terms = {"equation": lambda u, x: laplacian(u, x) + f(x), "measured": fit}
    batch = {"equation": x, "measured": (at, torch.sin(math.pi * at).prod(1, keepdim=True))}
    exact = 2 * math.pi**2 * torch.sin(math.pi * grid).prod(1)

    def error() -> float:
        with torch.no_grad():
            return relative(f(grid)[:, 0], exact)

    return Setting(ng.GaussNewton(net, terms, params={"f": f}), batch, error)


def hidden_side() -> Setting:
    """Δu = 0 on the unit square, u given on three sides and at 20 points of the middle line; u on the fourth side."""
    net, side, t = tanh_net(2, 32, 32, 1), torch.linspace(0, 1, 30, dtype=F64), torch.linspace(0, 1, 20, dtype=F64)

    def exact(x: Tensor) -> Tensor:
        return torch.sin(math.pi * x[:, :1]) * torch.sinh(math.pi * x[:, 1:]) / math.sinh(math.pi)

    zero = torch.zeros_like(side)
    given = torch.cat([torch.stack(p, dim=1) for p in ((zero, side), (zero + 1, side), (side, zero))])
    line = torch.stack([t, torch.full_like(t, 0.5)], dim=1)
    hidden = torch.stack([side, zero + 1], dim=1)
    terms = {"equation": lambda u, x: laplacian(u, x), "sides": fit, "measured": fit}
    batch = {
        "equation": torch.rand(300, 2, dtype=F64),
        "sides": (given, exact(given)),
        "measured": (line, exact(line)),
    }

    def error() -> float:
        with torch.no_grad():
            return relative(net(hidden), exact(hidden))

    return Setting(ng.GaussNewton(net, terms), batch, error)


PROBLEMS: dict[str, tuple[Callable[[], Setting], str]] = {
    "coefficient": (coefficient, "relative error of k"),
    "kovasznay": (kovasznay, "larger relative error of λ₁, λ₂"),
    "kovasznay, 1 % noise": (lambda: kovasznay(0.01), "larger relative error of λ₁, λ₂"),
    "source": (source, "relative L2 error of f"),
    "hidden side": (hidden_side, "relative L2 error on the side"),
}


class Track(NamedTuple):
    seconds: float
    error: float


def timed(setting: Setting, steps: Iterator[None], seconds: float) -> list[Track]:
    """CPU seconds and error after each step, until the time is spent."""
    spent, track = 0.0, []
    while spent < seconds:
        began = time.process_time()
        next(steps)
        spent += time.process_time() - began
        track.append(Track(spent, setting.error()))
    return track


def natural(setting: Setting) -> Iterator[None]:
    opt = ng.NaturalGradient(setting.metric)
    while True:
        opt.step(setting.batch)
        yield


def adam_and_lbfgs(setting: Setting, seconds: float) -> Iterator[None]:
    setting.metric.observe(setting.batch)  # binds the batch
    live, residuals, began = setting.metric.parameters, setting.metric.residuals, time.process_time()
    adam = torch.optim.Adam(live.values(), lr=1e-3)
    on = {"max_iter": 20, "tolerance_grad": 0, "tolerance_change": 0}  # goes on while there is time
    lbfgs = torch.optim.LBFGS(live.values(), history_size=100, line_search_fn="strong_wolfe", **on)

    def loss() -> Tensor:
        adam.zero_grad()
        r = residuals.values(live)
        out = 0.5 * (r @ r)
        out.backward()
        return out.detach()

    while True:
        if time.process_time() - began < seconds / 2:
            for _ in range(20):
                loss()
                adam.step()
        else:
            lbfgs.step(loss)
        yield


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1e} ({min(values):.0e} – {max(values):.0e})"


def row(name: str, seconds: float) -> str:
    ours, theirs, sooner = [], [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        first = PROBLEMS[name][0]()
        track = timed(first, natural(first), seconds)
        torch.manual_seed(seed)
        second = PROBLEMS[name][0]()
        rival = timed(second, adam_and_lbfgs(second, seconds), seconds)[-1].error
        ours.append(track[-1].error)
        theirs.append(rival)
        sooner.append(next((t.seconds for t in track if t.error <= rival), math.inf))
    when = statistics.median(sooner)
    reached = f"{when:.1f} s" if when < math.inf else "not reached"
    return f"| {name} | {PROBLEMS[name][1]} | {spread(ours)} | {spread(theirs)} | {reached} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", help=f"all of {', '.join(PROBLEMS)} where none is named")
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of each run")
    args = parser.parse_args()
    if unknown := [p for p in args.problems if p not in PROBLEMS]:
        parser.error(f"there is no problem {', '.join(unknown)}; there are {', '.join(PROBLEMS)}")
    torch.set_num_threads(1)
    print("| problem | error | natgrad | Adam + L-BFGS | natgrad is there after |\n|---|---|---|---|---|")
    for name in args.problems or PROBLEMS:
        print(row(name, args.seconds), flush=True)


if __name__ == "__main__":
    main()
