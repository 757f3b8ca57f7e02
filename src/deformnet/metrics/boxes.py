"""Box overlaps, and conversion of arguments to arrays."""

import numpy as np
from torch import Tensor

Array = Tensor | np.ndarray


def as_array(values: Array) -> np.ndarray:
    """Converts a tensor on any device, or an array, to an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def areas(boxes: np.ndarray) -> np.ndarray:
    """Areas of boxes [n, 4]; 0 for a box with negative width or height."""
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1)


def intersections(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas [n, m] of the intersections of boxes [n, 4] and others [m, 4]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(-1)


def ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union, [n, m]; 0 where both are empty."""
    common = intersections(boxes, others)
    union = areas(boxes)[:, None] + areas(others) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)
