"""Ground states of Ising chains from samples: the relative error of the energy by step rules.

    python -m benchmarks.sampled_ising [--sites 8 12] [--samples 100] [--steps 300] [--seeds 3]

States are drawn from |ψ|² anew at every step, as many hidden units as sites. The error is that of the energy summed
over all states, against the exact one. "damping" rows are the default rule with another smallest λ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

import natgrad as ng
from natgrad.cli.problems.ising import all_states, local_energy, prepare

RULES: dict[str, Callable[[], ng.StepRule | None]] = {
    "default": lambda: None,
    "fixed step": ng.FixedStep,
    "damping 1e-3": lambda: ng.TrustRegion(damping=1e-3, floor=1e-3),
    "damping 3e-3": lambda: ng.TrustRegion(damping=3e-3, floor=3e-3),
    "damping 2e-2": lambda: ng.TrustRegion(damping=2e-2, floor=2e-2),
}


def error(sites: int, seed: int, rule: ng.StepRule | None, samples: int = 100, steps: int = 300) -> float:
    """Return the relative error of the energy after training on samples."""
    setting, states = prepare((sites, sites), seed), all_states(sites)
    generator = torch.Generator().manual_seed(seed)
    opt = ng.NaturalGradient(setting.metric("auto"), step=rule)
    for _ in range(steps):
        with torch.no_grad():
            probability = torch.softmax(2 * setting.model(states), 0)
            drawn = states[torch.multinomial(probability, samples, replacement=True, generator=generator)]
            local = local_energy(setting.model, drawn, setting.model(drawn))
        opt.step({"states": drawn, "local_energy": local})
    return setting.error()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[8, 12])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for sites in given.sites:
        for name, rule in RULES.items():
            found = [error(sites, seed, rule(), given.samples, given.steps) for seed in range(given.seeds)]
            print(f"{sites:2d} sites  {name:14s}" + "".join(f"{e:10.1e}" for e in found), flush=True)


if __name__ == "__main__":
    main()
