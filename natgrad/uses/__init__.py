"""What a metric is good for besides a step: functions of a metric, fitted or from a file."""

from natgrad.uses.anchoring import Anchor, anchor
from natgrad.uses.laplace import Posterior, posterior
from natgrad.uses.merging import merge
from natgrad.uses.projection import effective_dimension, nearest
from natgrad.uses.pruning import prune
from natgrad.uses.rounding import round_weights
from natgrad.uses.scoring import influence, pair, self_influence

__all__ = [
    "Anchor",
    "Posterior",
    "anchor",
    "effective_dimension",
    "influence",
    "merge",
    "nearest",
    "pair",
    "posterior",
    "prune",
    "round_weights",
    "self_influence",
]
