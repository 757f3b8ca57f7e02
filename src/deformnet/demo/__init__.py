"""Training, evaluation and inspection on synthetic images: `deformnet demo`."""

__all__: list[str] = []  # parts of the command line
