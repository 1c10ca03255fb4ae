"""Which configuration is the cheapest whose loss is within a tolerance.

Read `promise` (what a number of answers promises), `race` (who is asked how much), `tune` (with a model), `page`.
"""
