"""Reproduction of the paper: its tables row by row, parameter counts and timings."""
