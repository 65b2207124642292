"""Derivatives in which torch is right: by reverse mode alone, of functions that are mended where that is not enough.

Forward mode of torch 2.13 has faults (`natgrad.function_space.composed`); reverse mode, also over itself, has fewer.
Fused attention has no second derivative, so attention is computed in the plain way here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.func import jacrev, vjp
from torch.overrides import TorchFunctionMode

from natgrad.function_space.composed import MENDED
from natgrad.function_space.forward_laplacian import Jet
from natgrad.function_space.jet_rules import PIECEWISE_LINEAR

FUSED = (  # (which is on, switch it) for each fused kernel; that of the CPU goes by the first
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)


NOTED = PIECEWISE_LINEAR | MENDED.keys()


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without fused kernels. (`torch.nn.attention.sdpa_kernel` takes ten times as long to enter.)"""
    before, plain = [on() for on, _ in FUSED], cuda.math_sdp_enabled()
    try:
        for _, switch in FUSED:
            switch(False)
        cuda.enable_math_sdp(True)
        yield
    finally:
        for (_, switch), value in zip(FUSED, before):
            switch(value)
        cuda.enable_math_sdp(plain)


TENSORS = ("A", "LU", "input", "pivots", "B")  # torch's names of what `MENDED` takes, in the order of their places


class Mended(TorchFunctionMode):
    """Takes the functions of `MENDED` in place of torch's, and notes those that have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.kinks: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in NOTED or any(type(a) is Jet for a in args):  # jets have rules of their own
            return func(*args, **kwargs) if kwargs else func(*args)
        if func in PIECEWISE_LINEAR:
            self.kinks.append(func.__name__)
        if func not in MENDED:
            return func(*args, **(kwargs or {}))
        named = dict(kwargs or {})
        given = [named.pop(n) for n in TENSORS if n in named]
        return MENDED[func](func, *args, *given, **named)


class Mending:
    """f with torch's faults mended in whatever it computes, and whatever transforms of torch.func it takes."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.__wrapped__ = f  # an attribute, so that a deep copy copies what f holds; named for `inspect.unwrap`

    def __call__(self, *args: Any) -> Any:
        with Mended(), plain_attention():
            return self.__wrapped__(*args)


def expanded(u: Callable[[Tensor], Tensor], x: Tensor, order: int) -> tuple[list[Tensor], list[str]]:
    """u (…), ∂u (…, d) and, of order 2, ∂²u (…, d, d) at x (d,), and the functions without a second derivative.

    Raises:
        TypeError: u returns no floating-point or complex tensor.
    """
    mode, imaginary = Mended(), False

    def real(y: Tensor) -> Tensor:
        nonlocal imaginary
        with mode:
            out = u(y)
        if not isinstance(out, Tensor) or not (out.is_floating_point() or out.is_complex()):
            got = f"a tensor of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"operators differentiate a function that returns one floating-point tensor, got {got}")
        imaginary = out.is_complex()
        return torch.view_as_real(out).movedim(-1, 0) if imaginary else out

    def with_value(y: Tensor) -> tuple[Tensor, Tensor]:
        out = real(y)
        return out, out

    def with_both(y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        slope, value = jacrev(with_value, has_aux=True)(y)
        return slope, (value, slope)

    recorded = torch.is_grad_enabled()
    with plain_attention(), torch.enable_grad():  # under no_grad torch reuses factors that vmap misreads
        if order == 1:
            slope, value = jacrev(with_value, has_aux=True)(x)
            parts = [value, slope]
        else:
            bend, (value, slope) = jacrev(with_both, has_aux=True)(x)
            parts = [value, slope, bend]
    parts = parts if recorded else [p.detach() for p in parts]
    return [torch.complex(p[0], p[1]) for p in parts] if imaginary else parts, mode.kinks


def pushforward(f: Callable[[Any], Tensor], at: Any, v: Any) -> Tensor:
    """f′(at) v by reverse mode twice: c ↦ f′(at)ᵀ c is linear, and its transpose is f′(at)."""
    with plain_attention(), torch.enable_grad():
        value, pull = vjp(f, at)  # type: ignore[misc]
        return vjp(lambda c: pull(c)[0], torch.zeros_like(value))[1](v)[0].detach()
