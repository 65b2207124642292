"""Ground state of the transverse-field Ising chain H = −Σ σᶻᵢσᶻᵢ₊₁ − h Σ σˣᵢ at h = 1, periodic, over all 2ᴸ states.

The wave function is a restricted Boltzmann machine with real weights (Carleo & Troyer 2017,
https://arxiv.org/abs/1606.02318). The exact energy at the critical point is −2 / sin(π / 2L) for even L.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from natgrad.cli.problems.pictures import line_pictures
from natgrad.cli.problems.problem import Problem, Published, Setting
from natgrad.function_space.quantum import QuantumGeometry

FIELD = 1.0  # h


class Boltzmann(nn.Module):
    """log ψ(s) = a·s + Σⱼ log cosh(bⱼ + Wⱼ·s) for spins s = ±1, (…, sites) → (…)."""

    def __init__(self, sites: int, hidden: int) -> None:
        super().__init__()
        self.visible = nn.Parameter(torch.zeros(sites))
        self.hidden = nn.Linear(sites, hidden)
        nn.init.normal_(self.hidden.weight, std=0.1)
        nn.init.normal_(self.hidden.bias, std=0.1)

    def forward(self, s: Tensor) -> Tensor:
        z = self.hidden(s).abs()
        return s @ self.visible + (z + torch.log1p(torch.exp(-2 * z)) - math.log(2)).sum(-1)


def all_states(sites: int) -> Tensor:
    """(2ᴸ, L) spins ±1"""
    bits = torch.arange(2**sites)[:, None] >> torch.arange(sites - 1, -1, -1) & 1
    return 1 - 2 * bits.double()


def local_energy(model: nn.Module, states: Tensor, log_psi: Tensor) -> Tensor:
    """E_loc(s) = −Σ sᵢsᵢ₊₁ − h Σᵢ ψ(s with spin i flipped)/ψ(s), (N,)"""
    sites = states.shape[1]
    flipped = states[:, None, :] * (1 - 2 * torch.eye(sites, dtype=states.dtype))  # (N, L, L)
    ratios = (model(flipped) - log_psi[:, None]).exp()
    return -(states * states.roll(-1, 1)).sum(1) - FIELD * ratios.sum(1)


def prepare(widths: tuple[int, ...], seed: int) -> Setting:
    sites, hidden = widths
    torch.manual_seed(seed)
    model = Boltzmann(sites, hidden).double()
    states = all_states(sites)
    exact = -2 / math.sin(math.pi / (2 * sites))

    def batch(step: int = 0) -> dict[str, Tensor]:
        with torch.no_grad():
            log_psi = model(states)
            weights = torch.softmax(2 * log_psi, 0)
            return {
                "states": states,
                "weights": weights,
                "local_energy": local_energy(model, states, log_psi),
            }

    def error() -> float:
        now = batch()
        return abs(float(now["weights"] @ now["local_energy"]) - exact) / abs(exact)

    def draw(folder: Path) -> list[Path]:
        with torch.no_grad():
            probability = torch.softmax(2 * model(states), 0)
        distance = torch.arange(sites)
        network = torch.stack([(probability * states[:, 0] * states[:, r]).sum() for r in distance.tolist()])
        ground = exact_probability(states)
        reference = torch.stack([(ground * states[:, 0] * states[:, r]).sum() for r in distance.tolist()])
        return line_pictures(distance, network, reference, ("distance r", "⟨σᶻ₀σᶻᵣ⟩"), folder)

    return Setting(
        model,
        lambda solver: QuantumGeometry(model, solver=solver),
        batch,
        error,
        "relative energy error",
        draw,
    )


def exact_probability(states: Tensor) -> Tensor:
    """|ψ₀|² of the exact ground state by power iteration on c − H, whose largest eigenvector it is."""
    n, sites = states.shape
    index = torch.arange(n)
    diagonal = -(states * states.roll(-1, 1)).sum(1)
    psi = torch.ones(n, dtype=states.dtype)
    for _ in range(2000):
        hop = torch.stack([psi[index ^ (1 << i)] for i in range(sites)]).sum(0)
        psi = sites * psi - diagonal * psi + FIELD * hop
        psi = psi / psi.norm()
    return psi.square()


problem = Problem(
    "ising-chain",
    "ground state of the Ising chain −Σ σᶻσᶻ − Σ σˣ, periodic, all states summed",
    {"rbm": (10, 10), "wide": (10, 30)},
    prepare,
    {
        "rbm": [
            Published("natural gradient, fixed step", 5.5e-5, None, 100),
            Published("Adam", 1.0e-4, None, 500),
        ]
    },
    seconds=20,
    loss_name="energy",
)
