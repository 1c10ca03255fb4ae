"""Which configuration is the cheapest whose loss is within a tolerance.

Read `promise` (what a number of answers promises), then `race` (who is asked how much).
"""
