"""Synthetic data sets: shapes that differ by outline alone."""

from deformnet.data.synthetic.scenes import Scene, SceneObject, Shapes
from deformnet.data.synthetic.shapes import SHAPE_CLASSES, scene, write_shapes

__all__ = ["SHAPE_CLASSES", "Scene", "SceneObject", "Shapes", "scene", "write_shapes"]
