"""What a metric is good for besides a step: functions of a metric, fitted or from a file."""

from natgrad.uses.influence import influence, pair, self_influence

__all__ = ["influence", "pair", "self_influence"]
