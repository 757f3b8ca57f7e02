"""Random boxes and detections, and their overlaps by definition."""

import numpy as np

from deformnet.metrics import GroundTruth, Predictions


def naive_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def random_set(seed, images=6, classes=3):
    """Objects, and detections near them, elsewhere, and of scores that often tie."""
    rng = np.random.default_rng(seed)
    targets, detections = {}, {}
    for i in range(images):
        n = int(rng.integers(0, 5))
        corners = rng.uniform(0, 40, (n, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 20, (n, 2))], 1)
        labels = rng.integers(0, classes, n)
        targets[f"{i}"] = GroundTruth(boxes, labels, rng.random(n) < 0.2)
        near = np.repeat(np.arange(n), 2)
        moved = boxes[near] + rng.normal(0, 2, (len(near), 4))
        lost = rng.uniform(0, 40, (3, 2))
        all_boxes = np.concatenate([moved, np.concatenate([lost, lost + 10], 1)])
        all_labels = np.concatenate([labels[near], rng.integers(0, classes, 3)])
        scores = rng.integers(1, 9, len(all_boxes)) / 10
        if rng.random() < 0.8:
            detections[f"{i}"] = Predictions(all_boxes, scores, all_labels)
    return targets, detections
