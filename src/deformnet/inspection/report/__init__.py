"""What a trained run has learned, on one page: `deformnet analyse`."""

from deformnet.inspection.report.analyse import analyse

__all__ = ["analyse"]
