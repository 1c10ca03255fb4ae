"""Cuts between decoder layers. Read `select` (which tokens leave), then `shorten` (how every layer gets fewer columns).

`state` says which columns of a pass show which image, `signals` what a method may read there, `taps` reads the layers.
"""
