"""Time and memory. Read `sweep`, then `cells` (one model, resolution and batch size) and `timing` (one generation).

`shaped` builds models of known shapes, `break_even` says from which output length on pruning pays, `tables` prints.
"""
