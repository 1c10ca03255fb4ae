"""Does it hold up: tasks, runs, tables. Built on the public API of tokprune alone."""

if __name__ != "tokprune.eval":
    raise ImportError("import tokprune.eval, not eval; run `pip install -e .` once in the repository root")
