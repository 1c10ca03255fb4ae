"""Rows as people read them. Start with `html`, the report of a comparison, then `tables` and `pareto`.

`stored` reads the folder of a run. `findings` puts the result in words, `losses` shows the questions that pruning
breaks, `exports` writes Markdown and CSV. `render` writes the tables of the docs, `explained` draws the tokens that
methods keep, `paired` compares two configurations.
"""
