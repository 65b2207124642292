"""natgrad: natural-gradient descent for PyTorch."""

from natgrad import operators
from natgrad.capture.ops import OpUse, op_rule
from natgrad.capture.tape import CaptureError
from natgrad.fisher.fisher import Fisher
from natgrad.fisher.likelihoods.distribution import Likelihood
from natgrad.fisher.likelihoods.loss import Loss
from natgrad.function_space.energy import Energy
from natgrad.function_space.gauss_newton import GaussNewton
from natgrad.function_space.hessian import Hessian
from natgrad.function_space.quantum import QuantumGeometry
from natgrad.metric.euclidean import Euclidean
from natgrad.metric.metric import Metric
from natgrad.optim.exact_quadratic import ExactQuadratic
from natgrad.optim.fixed import FixedStep
from natgrad.optim.grafted import Grafted
from natgrad.optim.kl_trust_region import KLTrustRegion
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.line_search import GridSearch
from natgrad.optim.normalised import NormalisedStep
from natgrad.optim.optimizer import NaturalGradient
from natgrad.optim.policy_gradient import NaturalPolicyGradient
from natgrad.optim.spring import Spring
from natgrad.optim.step_rule import StepContext, StepRule
from natgrad.optim.trust_region import TrustRegion
from natgrad.uses.anchoring import Anchor, anchor
from natgrad.uses.laplace import Posterior, posterior
from natgrad.uses.merging import merge
from natgrad.uses.projection import effective_dimension, nearest
from natgrad.uses.pruning import prune
from natgrad.uses.rounding import round_weights
from natgrad.uses.scoring import influence, pair, self_influence

__version__ = "0.1.0.dev0"
__all__ = [
    "Anchor",
    "CaptureError",
    "Energy",
    "Euclidean",
    "ExactQuadratic",
    "Fisher",
    "FixedStep",
    "GaussNewton",
    "Grafted",
    "GridSearch",
    "Hessian",
    "KLTrustRegion",
    "LevenbergMarquardt",
    "Likelihood",
    "Loss",
    "Metric",
    "NaturalGradient",
    "NaturalPolicyGradient",
    "NormalisedStep",
    "OpUse",
    "Posterior",
    "QuantumGeometry",
    "Spring",
    "StepContext",
    "StepRule",
    "TrustRegion",
    "anchor",
    "effective_dimension",
    "influence",
    "merge",
    "nearest",
    "op_rule",
    "operators",
    "pair",
    "posterior",
    "prune",
    "round_weights",
    "self_influence",
]
