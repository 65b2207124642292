"""natgrad: natural-gradient descent for PyTorch."""

from natgrad.fisher import Fisher
from natgrad.likelihoods import Likelihood
from natgrad.metric import Euclidean, Metric
from natgrad.optimizer import NaturalGradient
from natgrad.quadratic import ExactQuadratic
from natgrad.rules import Grafted, KLTrustRegion
from natgrad.steps import FixedStep

__version__ = "0.1.0.dev0"
__all__ = [
    "Euclidean",
    "ExactQuadratic",
    "Fisher",
    "FixedStep",
    "Grafted",
    "KLTrustRegion",
    "Likelihood",
    "Metric",
    "NaturalGradient",
]
