"""Op rules: what the layers of a model are made of. A rule of your own: ``@natgrad.op_rule(F.my_op)``."""

from natgrad.capture.ops import conv, elementwise, embedding, matmul, norm
from natgrad.capture.ops.base import IN_PLACE, RULES, OpUse, Picked, known_as, op_name, op_rule

__all__ = [
    "IN_PLACE",
    "RULES",
    "OpUse",
    "Picked",
    "conv",
    "elementwise",
    "embedding",
    "known_as",
    "matmul",
    "norm",
    "op_name",
    "op_rule",
]
