"""Inspection of trained runs: a report (`deformnet inspect analyze`) and an interactive viewer."""
