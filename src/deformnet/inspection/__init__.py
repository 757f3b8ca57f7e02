"""Inspection of trained runs: a report (`deformnet inspect analyze`) and an interactive viewer."""

__all__: list[str] = []  # parts of the command line
