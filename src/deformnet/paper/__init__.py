"""Reproduction of the paper: its tables row by row, parameter counts and timings."""

__all__: list[str] = []  # parts of the command line
