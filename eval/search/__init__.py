"""Searches that need a model. Read `search` (schedules) with `algorithms`, then `fit_exit` (gates) and `exits`.

`trials` holds the evaluated schedules, so that an interrupted search resumes.
"""
