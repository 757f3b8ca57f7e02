"""`python -m deformnet`: the command line, for `torchrun -m` and where no script is installed."""

from deformnet.cli import main

if __name__ == "__main__":
    main()
