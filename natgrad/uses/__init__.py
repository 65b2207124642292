"""What a metric is good for besides a step: functions of a metric, fitted or from a file."""

from natgrad.uses.influence import influence, pair, self_influence
from natgrad.uses.posterior import Posterior, posterior

__all__ = ["Posterior", "influence", "pair", "posterior", "self_influence"]
