"""Searches that need a model. Read `search` (schedules) with `algorithms`, then `fit_exit` (gates) and `exits`.

`trials` is what was evaluated, so that an interrupted search resumes.
"""
