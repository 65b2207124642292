"""Matrix products, by the faster of the libraries that PyTorch holds.

`torch.mm` in float32 goes to MKL, which keeps to 256-bit vectors on processors that are not Intel's; oneDNN uses all
512 bits there. The numbers agree to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST = 1.2e6  # multiplications below which the call costs more than the product saves
NARROW = 16  # columns below which the transposed product is faster
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
WIDE = _linear is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, for matrices or stacks (…, m, k) and (…, k, n)."""
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if m * k * n < SMALLEST or not is_wide(a) or not is_wide(b):
        if a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] == 1:  # gemm is faster than a batch of one
            return product(a[0], b[0]).unsqueeze(0)
        if n < NARROW <= k and a.dim() == b.dim() == 2:
            return torch.mm(b.mT, a.mT).mT
        return a @ b
    stack = max(a.dim(), b.dim()) - 2
    out: Tensor = _linear(whole(a.reshape(m, k)), whole(b.reshape(k, n).mT), None, "none", [], "")
    return out.reshape(*(1,) * stack, m, n)


def is_wide(t: Tensor) -> bool:
    """Whether a matrix, or a stack of one, is of the kind that oneDNN multiplies faster."""
    return (
        WIDE
        and t.dtype == torch.float32
        and t.device.type == "cpu"
        and type(t) is Tensor
        and not t.requires_grad
        and t.numel() == t.shape[-2] * t.shape[-1]
    )


def whole(t: Tensor) -> Tensor:
    """A matrix with rows or columns next to each other in memory: oneDNN takes others by a slow way."""
    return t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous()
