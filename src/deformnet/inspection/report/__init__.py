"""A report of what a trained run has learned: `deformnet inspect analyze`."""

from deformnet.inspection.report.analyze import analyze

__all__ = ["analyze"]
