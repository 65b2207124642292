"""log p(y | f) of a criterion's likelihood, with its constants, and what it predicts.

A criterion that is a sum is −log p up to a constant. One that is a mean over M terms of N data is, N times, that of a
likelihood in which a datum counts once: the squared error of D outputs is a normal with variance D/2 each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from natgrad.fisher.likelihoods.base import CriterionLikelihood
from natgrad.fisher.likelihoods.classification import CrossEntropy, NegativeLogLikelihood
from natgrad.fisher.likelihoods.distribution import FromDistribution
from natgrad.fisher.likelihoods.elementwise import Absolute, BinaryCrossEntropy, PoissonCount, Squared
from natgrad.fisher.likelihoods.gaussian import GaussianNoise
from natgrad.fisher.linearised import Linearised
from natgrad.linalg.tree import Tensors, replace_tensors


def classes_of(likelihood: CriterionLikelihood, lin: Linearised) -> str | None:
    """ "softmax" or "sigmoid" where the likelihood is one of classes, in logits; None where it is not."""
    if type(likelihood) in (CrossEntropy, NegativeLogLikelihood):
        return "softmax"
    if isinstance(likelihood, BinaryCrossEntropy):
        return "sigmoid"
    if isinstance(likelihood, FromDistribution):
        dist = base(likelihood.local(likelihood.outputs(lin.local))[1])
        if isinstance(dist, (td.Categorical, td.OneHotCategorical, td.Bernoulli)):
            given = likelihood.outputs(lin.local)
            logits = dist.logits if isinstance(dist, td.Bernoulli) else dist.logits.detach() - given[0]
            fits = len(given) == 1 and logits.shape == given[0].shape
            if fits and isinstance(dist, td.Bernoulli) and torch.allclose(logits.detach(), given[0]):
                return "sigmoid"
            spread = (logits - logits.mean(-1, keepdim=True)).abs().max() if fits else torch.tensor(math.inf)
            if not isinstance(dist, td.Bernoulli) and float(spread.detach()) < 1e-4:
                return "softmax"
    return None


def base(dist: td.Distribution) -> td.Distribution:
    while isinstance(dist, td.Independent):
        dist = dist.base_dist
    return dist


def class_dim(likelihood: CriterionLikelihood, f: Tensor) -> int:
    """The dimension of the output that counts classes."""
    return 1 if isinstance(likelihood, CrossEntropy) and f.dim() > 1 else f.dim() - 1


def probabilities(likelihood: CriterionLikelihood, kind: str, f: Tensor) -> Tensor:
    """Probabilities of logits, shaped like the output."""
    return f.sigmoid() if kind == "sigmoid" else f.softmax(class_dim(likelihood, f))


def constant(likelihood: CriterionLikelihood, outputs: Tensors, targets: Any, share: float) -> float:
    """What log p lacks beside −share · loss, summed over the terms of a batch; 0 where the loss is no likelihood.

    `share`: of a term in the log-likelihood of its datum: 1 for a sum, data over terms for a mean.
    """
    f = outputs[0]
    if isinstance(likelihood, Squared):
        return -0.5 * f.numel() * math.log(math.pi / share)
    if isinstance(likelihood, Absolute):
        return -f.numel() * math.log(2 / share)
    if isinstance(likelihood, GaussianNoise) and not likelihood.criterion.full:
        return -0.5 * share * f.numel() * math.log(2 * math.pi)
    if isinstance(likelihood, PoissonCount) and not likelihood.criterion.full:
        return -share * float(torch.lgamma(targets.to(f) + 1).sum())
    return 0.0


def noise(likelihood: CriterionLikelihood, lin: Linearised, share: float) -> Tensor | None:
    """The variance of the data about the first output, shaped like it; None where the likelihood has none."""
    outputs = likelihood.outputs(lin.local)
    if isinstance(likelihood, Squared):
        return torch.full_like(outputs[0], 0.5 / share)
    if isinstance(likelihood, GaussianNoise):
        return likelihood.variance(outputs).expand_as(outputs[0])
    if isinstance(likelihood, FromDistribution):
        dist = base(likelihood.local(outputs)[1])
        if isinstance(dist, td.Normal) and dist.loc.shape == outputs[0].shape:
            return dist.variance.detach().expand_as(outputs[0])
    return None


def sum_of_losses(likelihood: CriterionLikelihood, local: Any, outputs: Tensors, values: Tensors, y: Any) -> Tensor:
    """The loss summed over its terms, with other values of the outputs."""
    with torch.no_grad():
        return likelihood.sum_loss(replace_tensors(local, outputs, values), y)


def as_output(likelihood: CriterionLikelihood, kind: str, f: Tensor) -> Tensor:
    """Logits as the criterion takes them: nn.NLLLoss takes logarithms of probabilities, which are logits too."""
    return f.log_softmax(class_dim(likelihood, f)) if kind == "softmax" else f
