"""Runs over questions.

Read `runner` (a model over samples), then `rows` (what is written) and `folder` (where and when). `lines` reads JSON
lines strictly, `locks` keeps a second process out, `processes` shares a run, `stopwatch` times it.
"""
