"""Differential operators of a network at one point; see `natgrad.function_space.operators`."""

from natgrad.function_space.operators import (
    Derivatives,
    derivatives,
    divergence,
    gradient,
    laplacian,
    time_derivative,
    value_and_gradient,
)

__all__ = [
    "Derivatives",
    "derivatives",
    "divergence",
    "gradient",
    "laplacian",
    "time_derivative",
    "value_and_gradient",
]
