"""Training, evaluation and inspection on synthetic images: `deformnet demo`."""
