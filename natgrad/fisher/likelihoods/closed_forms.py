"""Roots of the Fisher matrix of `torch.distributions` families, in the parameters that they keep.

A column is a list of (parameter tensor, cotangent on it); the sum of the outer products of all columns is the Fisher
matrix E[∇log p ∇log pᵀ] of one element of the batch. Closed forms: Amari (2016), *Information Geometry and Its
Applications*, §2, and for gamma, beta and Dirichlet the second derivative of log Γ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

Column = list[tuple[Tensor, Tensor]]  # (parameter of the distribution, cotangent on it)


def _normal(d: td.Normal) -> list[Column]:
    return [[(d.loc, 1 / d.scale)], [(d.scale, 2**0.5 / d.scale)]]


def _log_normal(d: td.LogNormal) -> list[Column]:
    return _normal(d.base_dist)


def _laplace(d: td.Laplace) -> list[Column]:
    return [[(d.loc, 1 / d.scale)], [(d.scale, 1 / d.scale)]]


def _categorical(d: td.Categorical) -> list[Column]:
    # log p_k is the normalised logit itself, so √p_k e_k on the logits, which carry the graph of log-softmax
    root = d.probs.sqrt()
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    return [[(d.logits, root * e)] for e in eye]


def _one_hot(d: td.OneHotCategorical) -> list[Column]:
    return _categorical(d._categorical)


def _bernoulli(d: td.Bernoulli) -> list[Column]:
    return [[(d.logits, (d.probs * (1 - d.probs)).sqrt())]]


def _binomial(d: td.Binomial) -> list[Column]:
    return [[(d.logits, (d.total_count * d.probs * (1 - d.probs)).sqrt())]]


def _geometric(d: td.Geometric) -> list[Column]:
    return [[(d.logits, (1 - d.probs).sqrt())]]


def _poisson(d: td.Poisson) -> list[Column]:
    return [[(d.rate, d.rate.rsqrt())]]


def _exponential(d: td.Exponential) -> list[Column]:
    return [[(d.rate, 1 / d.rate)]]


def _gamma(d: td.Gamma) -> list[Column]:
    # Fisher [[ψ₁(α), −1/β], [−1/β, α/β²]] = L Lᵀ
    a = torch.polygamma(1, d.concentration).sqrt()
    b = -1 / (d.rate * a)
    c = (d.concentration / d.rate.square() - b.square()).sqrt()
    return [[(d.concentration, a), (d.rate, b)], [(d.rate, c)]]


def _dirichlet(d: td.Dirichlet) -> list[Column]:
    # Fisher diag ψ₁(α) − ψ₁(Σα) 11ᵀ
    alpha = d.concentration
    fisher = torch.diag_embed(torch.polygamma(1, alpha)) - torch.polygamma(1, alpha.sum(-1))[..., None, None]
    lower = torch.linalg.cholesky(fisher)
    return [[(alpha, lower[..., k])] for k in range(alpha.shape[-1])]


def _beta(d: td.Beta) -> list[Column]:
    return _dirichlet(d._dirichlet)


def _multivariate_normal(d: td.MultivariateNormal) -> list[Column]:
    lower = d._unbroadcasted_scale_tril
    if lower.requires_grad:
        raise ValueError(
            'kind="exact" covers MultivariateNormal with a fixed covariance; for a predicted one use kind="sampled"'
        )
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand(lower.shape)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False).mT  # columns of L⁻ᵀ
    return [[(d.loc, inverse[..., k].expand_as(d.loc))] for k in range(lower.shape[-1])]


CLOSED_FORMS: dict[type, Callable[[Any], list[Column]]] = {
    td.Bernoulli: _bernoulli,
    td.Beta: _beta,
    td.Binomial: _binomial,
    td.Categorical: _categorical,
    td.Dirichlet: _dirichlet,
    td.Exponential: _exponential,
    td.Gamma: _gamma,
    td.Geometric: _geometric,
    td.Laplace: _laplace,
    td.LogNormal: _log_normal,
    td.MultivariateNormal: _multivariate_normal,
    td.Normal: _normal,
    td.OneHotCategorical: _one_hot,
    td.Poisson: _poisson,
}
