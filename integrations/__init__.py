"""Where tokprune plugs in: one folder or file a host."""

if __name__ != "tokprune.integrations":
    raise ImportError(
        "import tokprune.integrations, not integrations; run `pip install -e .` once in the repository root"
    )
