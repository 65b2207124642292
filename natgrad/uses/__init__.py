"""What a metric is good for besides a step: functions of a metric, fitted or from a file."""

from natgrad.uses.anchoring import Anchor, anchor
from natgrad.uses.merging import merge
from natgrad.uses.projection import effective_dimension, nearest
from natgrad.uses.pruning import prune
from natgrad.uses.rounding import round_weights

__all__ = ["Anchor", "anchor", "effective_dimension", "merge", "nearest", "prune", "round_weights"]
