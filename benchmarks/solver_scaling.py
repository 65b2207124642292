"""CPU seconds a step of each solver against the rows N and the parameters P, with the exponent of a power-law fit.

``python benchmarks/solver_scaling.py [SOLVER …] [--quick]``: the 2-d Poisson problem on tanh networks 2-W-W-1, one
thread, float64; a step is one linearisation and one direction at the given damping (no line search), median of three.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

from natgrad import GaussNewton
from natgrad.cli.problems.problem import tanh_network
from natgrad.operators import laplacian

DAMPING = 1e-6
TERMS = {"interior": lambda u, x, f: laplacian(u, x) + f, "boundary": lambda u, x: u(x)}


def seconds(solver: str, points: int, width: int) -> tuple[int, float]:
    """P and the median CPU seconds of a step."""
    net = tanh_network((2, width, width, 1), 0)
    x, xb = torch.rand(points * 7 // 8, 2).double(), torch.rand(points - points * 7 // 8, 2).double()
    batch = {"interior": (x, x.sum(1)), "boundary": xb}
    metric = GaussNewton(net, TERMS, solver=solver)
    times = []
    for _ in range(4):
        began = time.process_time()
        metric.observe(batch)
        metric.direction(DAMPING)
        times.append(time.process_time() - began)
    return sum(p.numel() for p in net.parameters()), statistics.median(times[1:])


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of the log–log least-squares line."""
    xs, ys = [math.log(s) for s in sizes], [math.log(t) for t in times]
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("solvers", nargs="*", help="all where none is named")
    args = parser.parse_args()
    quick = args.quick
    torch.set_num_threads(1)
    rows = [128, 256, 512] if quick else [256, 512, 1024, 2048]
    widths = {"dense": [8, 12, 16], "kernel": [16, 24, 32], "cg": [8, 12, 16]}
    if not quick:
        widths = {"dense": [12, 18, 26, 36], "kernel": [32, 48, 64, 96], "cg": [32, 48, 64, 96]}
    for solver in args.solvers or widths:
        fixed = widths[solver][len(widths[solver]) // 2]
        by_n = [seconds(solver, n, fixed) for n in rows]
        print(
            f"{solver:<9} P = {by_n[0][0]}: "
            + "  ".join(f"N {n}: {t:.4f} s" for n, (_, t) in zip(rows, by_n))
            + f"  ∝ N^{exponent(rows, [t for _, t in by_n]):.2f}",
            flush=True,
        )
        middle = rows[len(rows) // 2 - 1]
        by_p = [seconds(solver, middle, w) for w in widths[solver]]
        print(
            f"{solver:<9} N = {middle}: "
            + "  ".join(f"P {p}: {t:.4f} s" for p, t in by_p)
            + f"  ∝ P^{exponent([p for p, _ in by_p], [t for _, t in by_p]):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
