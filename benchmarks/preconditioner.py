"""Conjugate gradients on JᵀJ + λI of poisson2d with the Nyström and the Kronecker preconditioner, and with none.

``python benchmarks/preconditioner.py [--network large] [--warm 5]`` prints the iterations to a relative residual of
1e-10 at the gradient, for λ relative to ‖JᵀJ‖, after some steps of the default method, and the CPU seconds of setting
up and iterating. A number in brackets is the residual where the iterations were used up.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from natgrad import NaturalGradient
from natgrad.iterative import Nystrom, conjugate_gradient
from natgrad.kronecker_sum import FactoredInverse, KroneckerSum, preconditioner
from natgrad.tasks.catalogue import PROBLEMS

LIMIT = 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="small", help="small (257 parameters) or large (9,873)")
    parser.add_argument("--warm", type=int, default=5, help="steps before the measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of conjugate gradients that stop short
    problem = PROBLEMS["poisson2d"]
    setting = problem.prepare(problem.networks[args.network], 1)
    metric = setting.metric("auto")
    opt = NaturalGradient(metric)
    for step in range(args.warm):
        opt.step(setting.batch(step))
    metric.observe(setting.batch(args.warm))
    rows = metric.linearised().kept()
    top = float(torch.linalg.matrix_norm(rows.like, 2)) ** 2
    right = rows.vjp(metric.root)
    print(f"{rows.count} rows, {rows.parameters} parameters, step {args.warm}, ‖JᵀJ‖ = {top:.3g}")
    for relative in (1e-2, 1e-4, 1e-6, 1e-8):
        damping = relative * top

        def kronecker(damping: float = damping) -> FactoredInverse:
            return preconditioner(KroneckerSum(metric.residuals, metric.point), damping)

        def plain(damping: float = damping) -> FactoredInverse:
            return FactoredInverse(KroneckerSum(metric.residuals, metric.point), damping)

        ways: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "none": lambda: lambda r: r,
            "Nyström": lambda damping=damping: Nystrom(rows, damping),
            "Kronecker at λ": plain,
            "Kronecker": kronecker,
        }
        line = f"λ = {relative:g}‖JᵀJ‖"
        for name, make in ways.items():
            began = time.process_time()
            x, count = conjugate_gradient(
                lambda v, damping=damping: rows.vjp(rows.jvp(v)) + damping * v, right, make(), 1e-10, LIMIT
            )
            spent = time.process_time() - began
            left = float((right - rows.vjp(rows.jvp(x)) - damping * x).norm() / right.norm())
            short = f" ({left:.0e})" if count == LIMIT else ""
            line += f"   {name} {count}{short}, {spent:.2f} s"
        print(line, flush=True)


if __name__ == "__main__":
    main()
