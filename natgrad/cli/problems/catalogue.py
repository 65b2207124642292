"""The problems of ``natgrad solve`` by name."""

from natgrad.cli.problems import burgers, deep_ritz, ising, poisson
from natgrad.cli.problems.problem import Problem

PROBLEMS: dict[str, Problem] = {
    p.name: p
    for p in (
        poisson.poisson2d,
        poisson.poisson5d,
        poisson.poisson10d,
        burgers.problem,
        deep_ritz.problem,
        ising.problem,
    )
}
