"""natgrad: natural-gradient descent for PyTorch."""

from natgrad.fisher import Fisher
from natgrad.likelihoods import Likelihood
from natgrad.metric import Euclidean, Metric
from natgrad.optimizer import NaturalGradient

__version__ = "0.1.0.dev0"
__all__ = ["Euclidean", "Fisher", "Likelihood", "Metric", "NaturalGradient"]
