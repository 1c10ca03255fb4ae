"""What things cost.

`flops` is the ledger, `shapes` says what a model's layers look like, `selection` what selecting costs.
"""

from .flops import Ledger, Ops, Shape
from .selection import SelectionCost, Widths, cut_ops
from .shapes import known_shape

__all__ = ["Ledger", "Ops", "SelectionCost", "Shape", "Widths", "cut_ops", "known_shape"]
