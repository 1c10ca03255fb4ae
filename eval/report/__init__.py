"""Rows as people read them. Start with `html`, the report of a comparison, then `tables` and `pareto`.

`stored` reads the folder of a run. `findings` puts the result in words, `losses` shows the questions that pruning
breaks, `exports` writes Markdown and CSV. `terminal` fits tables to a terminal, `progress` is the bar. `render` writes
the tables of the docs, `explained` shows the tokens that methods keep, drawn by `drawing`, `paired` compares two
configurations.
"""
