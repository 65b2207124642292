"""Ground states of electrons against their exact energies: ``python benchmarks/fermions.py [ROW …] [--steps 500]``.

Wave functions are small networks: a Slater determinant times a Jastrow factor. The metric is `QuantumGeometry` with
every option its default. Expectations are sums over quadrature points weighted by |ψ|², so what is left is the error of
the optimization and the network. Local energies take −½(Δ log|ψ| + |∇ log|ψ||²) + V from `natgrad.operators`.

    hydrogen   one electron in −1/r, energy −1/2
    trap       two electrons of one spin in a harmonic trap on the line, without interaction: 1/2 + 3/2 = 2
    hooke      two electrons of opposite spin in a harmonic trap of spring constant 1/4 (ω = 1/2), repelled by 1/r₁₂: 2
               (Taut 1993, https://doi.org/10.1103/PhysRevA.48.3561)
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from natgrad import NaturalGradient, QuantumGeometry
from natgrad.operators import derivatives

WIDTH = 8
BAR = 1e-4  # of the error relative to the energy


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs)]
    return nn.Sequential(*layers)


class Hydrogen(nn.Module):
    """log ψ = −a r + net(r): x of shape (3,)."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.net = nn.Parameter(torch.tensor(0.6)), mlp(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        r = x.square().sum().sqrt()
        return self.net(torch.exp(-r)[None])[0] - self.decay * r


class Trap(nn.Module):
    """log|det(φ_i(x_j))| + Σ Jastrow(|x_i − x_j|²) − ½ a Σ x²: x of shape (electrons,)."""

    def __init__(self, electrons: int = 2) -> None:
        super().__init__()
        self.decay, self.orbitals, self.jastrow = nn.Parameter(torch.tensor(0.7)), mlp(1, electrons), mlp(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.combinations(torch.arange(len(x)))
        apart = (x[pairs[:, 0]] - x[pairs[:, 1]]).square()
        log_det = torch.linalg.slogdet(self.orbitals(x[:, None])).logabsdet
        return log_det + self.jastrow(torch.exp(-apart)[:, None]).sum() - 0.5 * self.decay * x.square().sum()


class Hooke(nn.Module):
    """log φ(r₁)φ(r₂) + Jastrow + r₁₂/(2 + 2b r₁₂), the last with the slope at r₁₂ = 0 that 1/r₁₂ asks for: x (6,)."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.screen = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(0.5))
        self.orbital, self.jastrow = mlp(1, 1), mlp(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        r = x.reshape(2, 3)
        squares, apart = r.square().sum(1), (r[0] - r[1]).square().sum()
        smooth = self.orbital(torch.exp(-squares / 4)[:, None]).sum() + self.jastrow(torch.exp(-apart[None] / 4))[0]
        distance = apart.sqrt()
        cusp = distance / (2 + 2 * self.screen.abs() * distance)
        return smooth + cusp - 0.5 * self.decay * squares.sum()


def gauss(n: int, end: float = math.inf) -> tuple[Tensor, Tensor]:
    """Nodes and log weights of ∫ f over [0, end], or over the line."""
    if end < math.inf:
        x, w = np.polynomial.legendre.leggauss(n)
        return torch.as_tensor((x + 1) * end / 2), torch.as_tensor(np.log(w * end / 2))
    x, w = np.polynomial.hermite.hermgauss(n)
    return torch.as_tensor(x), torch.as_tensor(np.log(w) + x**2)


def product(*rules: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Coordinates and log weights of a product of rules."""
    axes = torch.meshgrid(*(r[0] for r in rules), indexing="ij")
    logs = torch.meshgrid(*(r[1] for r in rules), indexing="ij")
    return [a.reshape(-1) for a in axes], torch.stack([w.reshape(-1) for w in logs]).sum(0)


def hydrogen() -> tuple[Tensor, Tensor]:
    r, logs = gauss(80, 30.0)
    return torch.stack([r, 0 * r, 0 * r], 1), logs + 2 * r.log()


def trap() -> tuple[Tensor, Tensor]:
    """Orders that share no node, so that no point is on the node of ψ."""
    (x, y), logs = product(gauss(40), gauss(41))
    return torch.stack([x, y], 1), logs


def hooke() -> tuple[Tensor, Tensor]:
    """By the centre of mass (0, 0, R) and the distance r at an angle to it, over which 1/r₁₂ has no kink."""
    (big, small, u), logs = product(gauss(16, 6.0), gauss(24, 12.0), gauss(4, 1.0))
    sine = (1 - u * u).sqrt()
    half = torch.stack([small * sine, 0 * u, small * u], 1) / 2
    centre = torch.stack([0 * u, 0 * u, big], 1)
    return torch.cat([centre + half, centre - half], 1), logs + 2 * (big.log() + small.log())


def repelled(x: Tensor) -> Tensor:
    return x.square().sum() / 8 + 1 / (x[:3] - x[3:]).square().sum().sqrt()


@dataclass
class Row:
    network: Callable[[], nn.Module]
    points: Callable[[], tuple[Tensor, Tensor]]
    potential: Callable[[Tensor], Tensor]
    exact: float


ROWS = {
    "hydrogen": Row(Hydrogen, hydrogen, lambda x: -1 / x.square().sum().sqrt(), -0.5),
    "trap": Row(Trap, trap, lambda x: x.square().sum() / 2, 2.0),
    "hooke": Row(Hooke, hooke, repelled, 2.0),
}


def local_energy(log_psi: nn.Module, row: Row, states: Tensor) -> tuple[Tensor, Tensor]:
    """E_loc and log|ψ| at every state, both (N,)."""
    params = {n: p.detach() for n, p in log_psi.named_parameters()}

    def at(x: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, bend = derivatives(lambda y: functional_call(log_psi, params, (y,)), x)
        return row.potential(x) - (bend + slope @ slope) / 2, value

    return vmap(at)(states)


def solve(name: str, steps: int, seed: int = 0) -> tuple[float, int, float]:
    """Energy after the steps, the step from which on its error was within `BAR` (or the last), and seconds."""
    row = ROWS[name]
    torch.manual_seed(seed)
    log_psi = row.network().double()
    states, logs = row.points()
    opt = NaturalGradient(QuantumGeometry(log_psi))
    energy, reached, began = math.nan, steps, time.process_time()
    for step in range(steps + 1):
        local, values = local_energy(log_psi, row, states)
        weights = torch.softmax(2 * values + logs, 0)
        energy = float(weights @ local)
        if abs(energy - row.exact) > BAR * abs(row.exact):
            reached = steps
        elif reached == steps:
            reached = step
        if step < steps:
            opt.step({"states": states, "weights": weights, "local_energy": local})
    return energy, reached, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help=f"all of {', '.join(ROWS)} where none is named")
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.rows or ROWS:
        energy, reached, seconds = solve(name, args.steps)
        error = abs(energy / ROWS[name].exact - 1)
        print(
            f"{'met    ' if error <= BAR else 'NOT MET'} {name:<9} energy {energy:.8f} (exact {ROWS[name].exact:g}), "
            f"error {error:.1e} after {args.steps} steps, within {BAR:g} from step {reached}, {seconds:.0f} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()
