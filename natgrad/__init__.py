"""natgrad: natural-gradient descent for PyTorch."""

from natgrad import operators
from natgrad.function_space import GaussNewton
from natgrad.metric import Euclidean, Metric
from natgrad.optimizer import NaturalGradient

__version__ = "0.1.0.dev0"
__all__ = ["Euclidean", "GaussNewton", "Metric", "NaturalGradient", "operators"]
