"""The networks that the tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

INITIALISATIONS = ("default", "xavier")


def perceptron(sizes: Sequence[int], activation: Callable[[], nn.Module], linear: Sequence[int] = ()) -> nn.Sequential:
    """Linear layers of the given sizes, activations after all but the last and those in `linear`."""
    layers: list[nn.Module] = []
    last = len(sizes) - 2
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(fan_in, fan_out))
        if i != last and i not in linear:
            layers.append(activation())
    return nn.Sequential(*layers)


def autoencoder(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """An encoder of the given sizes, a linear code, and the mirrored decoder that gives logits."""
    encoder = list(sizes)
    return perceptron([*encoder, *encoder[-2::-1]], activation, linear=(len(encoder) - 2,))


def initialise(model: nn.Module, init: str) -> nn.Module:
    """`default` leaves what PyTorch drew; `xavier` draws Glorot-uniform weights and zero biases.

    Glorot & Bengio, 2010, https://proceedings.mlr.press/v9/glorot10a.html, equation 16.
    """
    if init == "xavier":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    return model
