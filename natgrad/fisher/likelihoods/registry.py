"""The criteria that a metric is known for."""

from __future__ import annotations

from torch import nn

from natgrad.fisher.likelihoods.base import CriterionLikelihood, check_reduction
from natgrad.fisher.likelihoods.classification import CrossEntropy, Divergence, NegativeLogLikelihood
from natgrad.fisher.likelihoods.distribution import FromDistribution, Likelihood
from natgrad.fisher.likelihoods.elementwise import (
    Absolute,
    BernoulliProbability,
    BinaryCrossEntropy,
    PoissonCount,
    Squared,
)
from natgrad.fisher.likelihoods.gaussian import GaussianNoise
from natgrad.fisher.likelihoods.loss import GaussNewtonLoss, Loss, ModuleLoss

CRITERIA: dict[type[nn.Module], type[CriterionLikelihood]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.NLLLoss: NegativeLogLikelihood,
    nn.MSELoss: Squared,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy,
    nn.GaussianNLLLoss: GaussianNoise,
    nn.PoissonNLLLoss: PoissonCount,
    nn.BCELoss: BernoulliProbability,
    nn.KLDivLoss: Divergence,
    nn.L1Loss: Absolute,
    nn.HuberLoss: ModuleLoss,
    nn.SmoothL1Loss: ModuleLoss,
    nn.SoftMarginLoss: ModuleLoss,
    nn.MultiLabelSoftMarginLoss: ModuleLoss,
    Likelihood: FromDistribution,
    Loss: GaussNewtonLoss,
}


def likelihood_of(criterion: nn.Module) -> CriterionLikelihood:
    """The reading of a criterion as a sum of loss terms with a curvature each.

    Raises:
        TypeError: it is not a module of the list, or a subclass whose forward may differ.
        ValueError: its reduction is neither "mean" nor "sum".
    """
    likelihood = CRITERIA.get(type(criterion))
    if likelihood is None:
        known = ", ".join(
            f"nn.{t.__name__}" if t.__module__.startswith("torch.") else f"ng.{t.__name__}(…)" for t in CRITERIA
        )
        shown = (
            f"the class {criterion.__name__} itself (pass an instance)"
            if isinstance(criterion, type)
            else type(criterion).__name__
        )
        raise TypeError(
            f"there is no metric for {shown}. Supported criteria: {known}. Any other loss that is twice differentiable "
            "and convex in the outputs: ng.Loss(lambda output, target: …), called in its place; any other "
            "log-likelihood: ng.Likelihood(lambda output: torch.distributions.…)"
        )
    check_reduction(criterion)
    return likelihood(criterion)
