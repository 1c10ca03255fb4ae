"""Benchmark suites of others.

Read `lmms` (lmms-eval); `export` writes our tasks for it, `scores` reads what it found.
"""
