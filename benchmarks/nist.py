"""NIST's 27 nonlinear regressions, from both of their starts: how many of the certified digits a rule reaches.

    python -m benchmarks.nist [NAME …] [--steps 400] [--rules default levenberg-marquardt]

The problems are those of the Statistical Reference Datasets (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml),
read from NATGRAD_DATA/nist, or ../shared/data/nist. Digits are the smallest over the parameters of
−log₁₀ |b − certified| / |certified|, as NIST counts them, at most 11, which is what they certify. A rule ends where a
step changes no parameter by more than 1e-13 of itself, or after `--steps` steps.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import natgrad as ng

DATA = Path(os.environ.get("NATGRAD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "nist"
CERTIFIED = 11  # digits
WANTED = 6
ENDED = 1e-13  # of a parameter: a step that changes all by less is the last one
NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"

exp, pi = torch.exp, torch.pi


def gauss(x: Tensor, b: Sequence[Tensor]) -> Tensor:
    b1, b2, b3, b4, b5, b6, b7, b8 = b
    return b1 * exp(-b2 * x) + b3 * exp(-((x - b4) ** 2) / b5**2) + b6 * exp(-((x - b7) ** 2) / b8**2)


def lanczos(x: Tensor, b: Sequence[Tensor]) -> Tensor:
    return b[0] * exp(-b[1] * x) + b[2] * exp(-b[3] * x) + b[4] * exp(-b[5] * x)


def chwirut(x: Tensor, b: Sequence[Tensor]) -> Tensor:
    return exp(-b[0] * x) / (b[1] + b[2] * x)


def cubics(x: Tensor, b: Sequence[Tensor]) -> Tensor:
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def enso(x: Tensor, b: Sequence[Tensor]) -> Tensor:
    def wave(c: Tensor, s: Tensor, period: Tensor | float) -> Tensor:
        return c * torch.cos(2 * pi * x / period) + s * torch.sin(2 * pi * x / period)

    return b[0] + wave(b[1], b[2], 12) + wave(b[4], b[5], b[3]) + wave(b[7], b[8], b[6])


MODELS: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "Bennett5": lambda x, b: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": lambda x, b: b[0] * (1 - exp(-b[1] * x)),
    "Chwirut1": chwirut,
    "Chwirut2": chwirut,
    "DanWood": lambda x, b: b[0] * x ** b[1],
    "ENSO": enso,
    "Eckerle4": lambda x, b: b[0] / b[1] * exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": gauss,
    "Gauss2": gauss,
    "Gauss3": gauss,
    "Hahn1": cubics,
    "Kirby2": lambda x, b: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "Lanczos1": lanczos,
    "Lanczos2": lanczos,
    "Lanczos3": lanczos,
    "MGH09": lambda x, b: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda x, b: b[0] * exp(b[1] / (x + b[2])),
    "MGH17": lambda x, b: b[0] + b[1] * exp(-x * b[3]) + b[2] * exp(-x * b[4]),
    "Misra1a": lambda x, b: b[0] * (1 - exp(-b[1] * x)),
    "Misra1b": lambda x, b: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda x, b: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda x, b: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda x, b: b[0] - b[1] * x[0] * exp(-b[2] * x[1]),  # of log y
    "Rat42": lambda x, b: b[0] / (1 + exp(b[1] - b[2] * x)),
    "Rat43": lambda x, b: b[0] / (1 + exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda x, b: b[0] - b[1] * x - torch.atan(b[2] / (x - b[3])) / pi,
    "Thurber": cubics,
}


@dataclass(frozen=True)
class Regression:
    """One problem: two starts and the certified values, (parameters,); x (n, columns) and y (n,)."""

    name: str
    starts: tuple[Tensor, Tensor]
    certified: Tensor
    x: Tensor
    y: Tensor


class Curve(nn.Module):
    """y(x) at one point x, (columns,), with parameters b."""

    def __init__(self, name: str, start: Tensor) -> None:
        super().__init__()
        self.model, self.b = MODELS[name], nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x if len(x) > 1 else x[0], self.b.unbind())


def read(name: str, folder: Path = DATA) -> Regression:
    """Return a problem from its file, in float64.

    Raises:
        FileNotFoundError: it is not there.
    """
    lines = (folder / f"{name}.dat").read_text().splitlines()
    values = torch.tensor(
        [
            [float(v) for v in re.findall(NUMBER, line.split("=")[1])[:3]]
            for line in lines[:60]
            if re.match(r"\s*b\d+\s*=", line)
        ],
        dtype=torch.float64,
    )  # (parameters, 3)
    first = max(i for i, line in enumerate(lines) if line.startswith("Data:")) + 1
    rows = [[float(v) for v in line.split()] for line in lines[first:] if line.strip()]
    table = torch.tensor(rows, dtype=torch.float64)
    y = table[:, 0].log() if name == "Nelson" else table[:, 0]
    return Regression(name, (values[:, 0], values[:, 1]), values[:, 2], table[:, 1:], y)


def digits(found: Tensor, certified: Tensor) -> float:
    """Return the certified digits that all parameters have, between 0 and 11."""
    error = ((found - certified) / certified).abs().max()
    return min(max(float(-error.log10()), 0.0), CERTIFIED) if bool(torch.isfinite(error)) else 0.0


def fit(problem: Regression, start: int, rule: ng.StepRule | None, steps: int) -> tuple[float, int]:
    """Return the digits that a rule reaches from a start, 0 or 1, and the steps it took."""
    curve = Curve(problem.name, problem.starts[start])
    opt = ng.NaturalGradient(ng.GaussNewton(curve, {"fit": lambda u, x, y: u(x) - y}), step=rule)
    taken = 0
    while taken < steps:
        taken += 1
        before = curve.b.detach().clone()
        opt.step({"fit": (problem.x, problem.y)})
        if bool(((curve.b - before).abs() <= ENDED * before.abs()).all()):
            break
    return digits(curve.b.detach(), problem.certified), taken


RULES: dict[str, Callable[[], ng.StepRule | None]] = {
    "default": lambda: None,
    "levenberg-marquardt": ng.LevenbergMarquardt,
    "straight": lambda: ng.LevenbergMarquardt(geodesic=False),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], metavar="NAME", help="problems; all if none")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES)[:2])
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args(arguments)
    if not DATA.is_dir():
        raise SystemExit(f"the problems are not in {DATA}; set NATGRAD_DATA to the folder that holds nist/")
    torch.set_num_threads(1)
    print(f"{'':10s}" + "".join(f"{rule:>26s}" for rule in given.rules))
    reached, total, began = dict.fromkeys(given.rules, 0), 0, time.perf_counter()
    for name in given.names or MODELS:
        problem = read(name)
        for start in range(2):
            total += 1
            line = f"{name:9s}{start + 1}"
            for rule in given.rules:
                try:
                    found, steps = fit(problem, start, RULES[rule](), given.steps)
                    reached[rule] += found >= WANTED
                    line += f"{found:14.1f} {steps:4d} steps "
                except Exception as error:
                    line += f"{type(error).__name__:>25s} "
            print(line, flush=True)
    for rule in given.rules:
        print(f"{rule}: {reached[rule]} of {total} to {WANTED} digits")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
