"""Time and memory. Read `settings`, `sweep`, `cells` (one resolution and batch size) and `timing` (one generation).

`shaped` builds models of known shapes, `break_even` finds the output lengths at which pruning gains, `tables` prints.
`decode_steps` times steps of decoding alone, relative to a short cache that is made by hand.
"""
