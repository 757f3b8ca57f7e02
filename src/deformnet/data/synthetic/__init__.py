"""Synthetic data sets: shapes that differ by outline alone."""
