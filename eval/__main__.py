"""The command line as a module: `torchrun --nproc_per_node 2 -m tokprune.eval compare ...`."""

from tokprune.cli import main

if __name__ == "__main__":
    main()
