"""The criteria that are read as likelihoods."""

from __future__ import annotations

from torch import nn

from natgrad.fisher.likelihoods.base import CriterionLikelihood, check_reduction
from natgrad.fisher.likelihoods.classification import CrossEntropy, NegativeLogLikelihood
from natgrad.fisher.likelihoods.distribution import FromDistribution, Likelihood
from natgrad.fisher.likelihoods.elementwise import BinaryCrossEntropy, PoissonCount, Squared
from natgrad.fisher.likelihoods.gaussian import GaussianNoise

CRITERIA: dict[type[nn.Module], type[CriterionLikelihood]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.NLLLoss: NegativeLogLikelihood,
    nn.MSELoss: Squared,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy,
    nn.GaussianNLLLoss: GaussianNoise,
    nn.PoissonNLLLoss: PoissonCount,
    Likelihood: FromDistribution,
}


def likelihood_of(criterion: nn.Module) -> CriterionLikelihood:
    """The reading of a criterion as −log p(y | f).

    Raises:
        TypeError: it is not a module of the list, or a subclass whose forward may differ.
        ValueError: its reduction is neither "mean" nor "sum".
    """
    likelihood = CRITERIA.get(type(criterion))
    if likelihood is None:
        known = ", ".join(f"nn.{t.__name__}" if t is not Likelihood else "ng.Likelihood(…)" for t in CRITERIA)
        shown = (
            f"the class {criterion.__name__} itself (pass an instance)"
            if isinstance(criterion, type)
            else type(criterion).__name__
        )
        raise TypeError(
            f"cannot read {shown} as −log p(y|f). Supported criteria: {known}. "
            "For any other loss that is a log-likelihood, pass ng.Likelihood(lambda output: torch.distributions.…)"
        )
    check_reduction(criterion)
    return likelihood(criterion)
