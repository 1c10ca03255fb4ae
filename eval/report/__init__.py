"""Rows as people read them. Read `html` (the report of a comparison), then `tables` and `pareto`.

`findings` says it in words, `losses` shows what was lost, `exports` writes Markdown and CSV, `render` the tables of
the docs, `explained` pictures of kept tokens, `paired` compares two configurations.
"""
