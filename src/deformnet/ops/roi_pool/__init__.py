"""Deformable RoI pooling, plain and position-sensitive."""
