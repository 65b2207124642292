"""natgrad: natural-gradient descent for PyTorch."""

from natgrad import operators
from natgrad.capture import CaptureError
from natgrad.fisher import Fisher
from natgrad.function_space import GaussNewton
from natgrad.hessian import Hessian
from natgrad.likelihoods import Likelihood
from natgrad.metric import Euclidean, Metric
from natgrad.optimizer import NaturalGradient
from natgrad.quadratic import ExactQuadratic
from natgrad.quantum import QuantumGeometry
from natgrad.rules import Grafted, KLTrustRegion
from natgrad.steps import FixedStep
from natgrad.variational import Energy

__version__ = "0.1.0.dev0"
__all__ = [
    "CaptureError",
    "Energy",
    "Euclidean",
    "ExactQuadratic",
    "Fisher",
    "FixedStep",
    "GaussNewton",
    "Grafted",
    "Hessian",
    "KLTrustRegion",
    "Likelihood",
    "Metric",
    "NaturalGradient",
    "QuantumGeometry",
    "operators",
]
