"""The command line as a module: `python -m tokprune`, and `torchrun --nproc_per_node 2 -m tokprune compare ...`."""

from tokprune.cli import main

if __name__ == "__main__":
    main()
