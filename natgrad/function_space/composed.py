"""Functions that are composed of others: as rules of jets, and where torch's own derivatives are wrong.

With Y = A⁻¹ and Gᵢ = Y ∂ᵢA (Magnus & Neudecker 2019, chapter 8) a matrix function has the jet

    ∂ᵢY = −Gᵢ Y,                  Σ wᵢ∂ᵢ²Y = −Y (Σ wᵢ∂ᵢ²A) Y + 2 Σ wᵢ GᵢGᵢ Y,
    ∂ᵢ log|det A| = tr Gᵢ,        Σ wᵢ∂ᵢ² log|det A| = tr(Y Σ wᵢ∂ᵢ²A) − Σ wᵢ tr(GᵢGᵢ).

`MENDED` holds what torch 2.13 differentiates wrongly without a word: det, slogdet, logdet, solve and tensorsolve under
vmap by forward mode, or by any mode under no_grad; these and cholesky_inverse by forward mode over another transform;
lu_solve under vmap of both its arguments; det, layer_norm, instance_norm and batch_norm to third order, as training on
their second derivatives does. Composed of what is differentiated rightly they are right in every mode
(tests/function_space/test_mended.py). cdist has no second derivative in torch, and has one here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.function_space.forward_laplacian import Jet, NoRule

Value = Any  # a tensor or a jet


def _named(sign: Tensor, logabsdet: Value) -> Any:
    """What torch.linalg.slogdet returns, by place or name."""
    return torch.return_types.slogdet((sign, logabsdet))


# of jets alone -------------------------------------------------------------------------------------------------


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _inverse(func: Any, a: Jet) -> Jet:
    y = torch.linalg.inv(a.value)
    g = y @ a.first
    return a.of(y, -g @ y, lambda: 2 * a.weighted(g @ g) @ y - y @ a.components[-1] @ y)


def _solve(func: Any, a: Value, b: Value, *, left: bool = True) -> Jet:
    y = _inverse(None, a) if type(a) is Jet else torch.linalg.inv(a)
    return _of_columns(lambda columns: y @ columns if left else columns @ y, a, b)


def _log_determinant(a: Jet, value: Tensor) -> Jet:
    y = torch.linalg.inv(a.value)
    g = y @ a.first
    return a.of(value, _trace(g), lambda: _trace(y @ a.components[-1]) - a.weighted(_trace(g @ g)))


def _slogdet(func: Any, a: Jet) -> Any:
    sign, value = torch.linalg.slogdet(a.value)
    return _named(sign, _log_determinant(a, value))


def _logdet(func: Any, a: Jet) -> Jet:
    return _log_determinant(a, torch.logdet(a.value))


def _det(func: Any, a: Value) -> Value:
    """det A = det A₀ · exp(log|det A| − log|det A₀|) near the point A₀."""
    value = torch.linalg.det(a.value)
    return torch.exp(_log_determinant(a, torch.zeros_like(value))) * value  # type: ignore[arg-type]


# of tensors alone ----------------------------------------------------------------------------------------------


def _solve_by_triangles(func: Any, a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    lu, pivots = torch.linalg.lu_factor(a)
    return _of_columns(lambda columns: _lu_solve(None, lu, pivots, columns, left=left), a, b)


def _lu_solve(func: Any, lu: Tensor, pivots: Tensor, b: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """A⁻¹b or A⁻ᴴb, and bA⁻¹ or bA⁻ᴴ from the right, of A = PLU by triangular systems."""
    if not left:  # bA⁻¹ = (A⁻ᴴbᴴ)ᴴ
        return _lu_solve(None, lu, pivots, b.mH, adjoint=not adjoint).mH
    p, lower, upper = torch.lu_unpack(lu, pivots)
    if adjoint:  # AᴴX = UᴴLᴴPᵀX
        half = torch.linalg.solve_triangular(upper.mH, b, upper=False)
        return p @ torch.linalg.solve_triangular(lower.mH, half, upper=True, unitriangular=True)
    half = torch.linalg.solve_triangular(lower, p.mT @ b, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, half, upper=True)


def _tensorsolve(func: Any, a: Tensor, b: Tensor, dims: Any = None) -> Tensor:
    if dims is not None:
        return func(a, b, dims)
    return _solve_by_triangles(None, a.reshape(b.numel(), -1), b.reshape(-1)).reshape(a.shape[b.ndim :])


def _cholesky_inverse(func: Any, factor: Tensor, upper: bool = False) -> Tensor:
    one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    root = torch.linalg.solve_triangular(factor, one, upper=upper)
    return root @ root.mH if upper else root.mH @ root


def _slogdet_by_lu(func: Any, a: Tensor) -> Any:
    """A = PLU: det A is the product of the diagonal of U, times −1 for every row that P exchanges."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(a)
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    still = torch.arange(1, a.shape[-1] + 1, device=a.device)
    signs = (diagonal if a.is_complex() else diagonal.detach()).sgn()  # real ones are constant
    sign = signs.prod(-1) * (1 - 2 * ((pivots != still).sum(-1) % 2))
    return _named(sign, diagonal.abs().log().sum(-1))


def _logdet_by_lu(func: Any, a: Tensor) -> Tensor:
    sign, value = _slogdet_by_lu(None, a)
    return torch.where(sign < 0, torch.nan, value)


def _det_by_lu(func: Any, a: Tensor) -> Tensor:
    try:
        torch.linalg.inv(a.detach())
    except RuntimeError:  # singular: torch is right in first and second derivatives
        return func(a)
    sign, value = _slogdet_by_lu(None, a)
    return sign * value.exp()


# of both -------------------------------------------------------------------------------------------------------


def _of_columns(f: Callable[[Value], Value], a: Value, b: Value) -> Value:
    """f of the right-hand sides of a system, which may be one vector (or a batch of them) as torch tells them apart."""
    vectors = b.ndim == 1 or (b.ndim == a.ndim - 1 and tuple(b.shape) == tuple(a.shape[:-1]))
    return f(b[..., None])[..., 0] if vectors else f(b)


def _softmax(func: Any, z: Jet, dim: int, *, _stacklevel: int = 3) -> Value:
    e = torch.exp(z - z.value.amax(dim, keepdim=True).detach())
    return e / e.sum(dim, keepdim=True)


def _logsumexp(func: Any, z: Jet, dim: int, keepdim: bool = False) -> Value:
    top = z.value.amax(dim, keepdim=True).detach()
    out = torch.log(torch.exp(z - top).sum(dim, keepdim=True)) + top
    return out if keepdim else out.squeeze(dim)


def _log_softmax(func: Any, z: Jet, dim: int, *, _stacklevel: int = 3) -> Value:
    return z - _logsumexp(None, z, dim, keepdim=True)


def _normalised(x: Value, axes: Sequence[int], eps: float) -> Value:
    """x with mean 0 and variance 1 over the axes."""
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _scaled(x: Value, weight: Value, bias: Value) -> Value:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    func: Any, x: Value, shape: Sequence[int], weight: Value = None, bias: Value = None, eps: float = 1e-5, *_: Any
) -> Value:
    if tuple(x.shape[x.ndim - len(shape) :]) != tuple(shape):  # let torch say what is wrong
        raise (
            NoRule("layer_norm of another shape")
            if type(x) is Jet
            else ValueError(f"layer_norm over {tuple(shape)} of a tensor of shape {tuple(x.shape)}")
        )
    return _scaled(_normalised(x, tuple(range(-len(shape), 0)), eps), weight, bias)


def _by_channel(parameter: Value, x: Value) -> Value:
    """(C,) as (1, C, 1, …)"""
    return None if parameter is None else parameter.reshape(1, -1, *(1,) * (x.ndim - 2))


def _by_torch(func: Any, *args: Any) -> Any:
    if any(type(a) is Jet for a in args):  # torch would hand it back to the rule
        raise NoRule(func.__name__)
    return func(*args)


def _instance_norm(
    func: Any,
    x: Value,
    running_mean: Value = None,
    running_var: Value = None,
    weight: Value = None,
    bias: Value = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    if not use_input_stats or running_mean is not None:
        return _by_torch(func, x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _scaled(_normalised(x, tuple(range(2, x.ndim)), eps), _by_channel(weight, x), _by_channel(bias, x))


def _batch_norm(
    func: Any,
    x: Value,
    running_mean: Value,
    running_var: Value,
    weight: Value = None,
    bias: Value = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    if not training or running_mean is not None:
        return _by_torch(func, x, running_mean, running_var, weight, bias, training, momentum, eps)
    axes = (0, *range(2, x.ndim))
    return _scaled(_normalised(x, axes, eps), _by_channel(weight, x), _by_channel(bias, x))


def _cdist(func: Any, a: Value, b: Value, p: float = 2.0, compute_mode: str | None = None) -> Value:
    return torch.linalg.vector_norm(a[..., :, None, :] - b[..., None, :, :], p, dim=-1)


OF_BOTH: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch.cdist: _cdist,
}
COMPOSED: dict[Any, Callable[..., Any]] = {
    **OF_BOTH,
    **dict.fromkeys([torch.linalg.inv, torch.inverse, Tensor.inverse], _inverse),
    torch.linalg.solve: _solve,
    **dict.fromkeys([torch.linalg.slogdet, torch.slogdet, Tensor.slogdet], _slogdet),
    **dict.fromkeys([torch.logdet, Tensor.logdet], _logdet),
    **dict.fromkeys([torch.linalg.det, torch.det, Tensor.det], _det),
    **dict.fromkeys([torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax], _softmax),
    **dict.fromkeys([torch.log_softmax, Tensor.log_softmax, F.log_softmax, torch.special.log_softmax], _log_softmax),
    **dict.fromkeys([torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp], _logsumexp),
}
MENDED: dict[Any, Callable[..., Any]] = {
    **OF_BOTH,
    torch.linalg.solve: _solve_by_triangles,
    torch.linalg.lu_solve: _lu_solve,
    torch.linalg.tensorsolve: _tensorsolve,
    **dict.fromkeys([torch.cholesky_inverse, Tensor.cholesky_inverse], _cholesky_inverse),
    **dict.fromkeys([torch.linalg.slogdet, torch.slogdet, Tensor.slogdet], _slogdet_by_lu),
    **dict.fromkeys([torch.logdet, Tensor.logdet], _logdet_by_lu),
    **dict.fromkeys([torch.linalg.det, torch.det, Tensor.det], _det_by_lu),
}
