"""What every linear layer of a network sees and gives on its way through a differential operator.

Under the forward Laplacian a linear layer maps S = d + 2 components (value, first derivatives, Laplacian) with one
weight, as it maps positions in weight sharing. With a_s the inputs (a one for the bias beside the value) and g_s the
derivatives of a residual with respect to the outputs, the residual's derivative is Σ_s g_s a_sᵀ (Dangel, Müller &
Zeinhofer 2024, https://arxiv.org/abs/2405.15603, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.function_space.forward_laplacian import Jet


class LinearTap(TorchFunctionMode):
    """Notes the input of every linear layer and adds a shift to its output, in the order of use."""

    def __init__(self, names: dict[int, tuple[str, str | None]], shifts: list[Tensor] | None) -> None:
        super().__init__()
        self.names, self.shifts = names, shifts  # id of a weight → names of weight and bias
        self.layers: list[tuple[str, str | None]] = []
        self.inputs: list[Tensor] = []
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear or len(args) < 2 or id(args[1]) not in self.names:
            return out
        jet = type(args[0]) is Jet
        data, result = (args[0].components, out.components) if jet else (args[0][None], out[None])
        one = torch.zeros_like(data[:, :1])
        one = torch.cat([torch.ones_like(one[:1]), one[1:]])
        self.layers.append(self.names[id(args[1])])
        self.inputs.append(torch.cat([data, one], dim=1))  # (S, in + 1)
        self.shapes.append(result.shape)
        if self.shifts is not None:
            result = result + self.shifts[len(self.layers) - 1]
        return args[0].like(result) if jet else result[0]
