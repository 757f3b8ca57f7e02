"""The rules of RoI pooling, written as loops over Python numbers."""

import itertools
import math

import torch
from roi_pool_cases import Case

# For one sample on one axis: the pixels read, their weights, and the derivatives of the weights.
Read = list[tuple[int, float, float]]


def half_away(number: float) -> int:
    return int(math.copysign(math.floor(abs(number) + 0.5), number))


def read_zeros(position: float, size: int) -> Read:
    """Equation 4 on one axis; the derivative is the one from the right."""
    if not -1 <= position < size:
        return []
    return [
        (q, 1 - abs(q - position), 1.0 if position < q else -1.0)
        for q in range(size)
        if q - 1 <= position < q + 1
    ]


def read_clamped(position: float, size: int) -> Read:
    """Beyond the first and the last pixel, their values."""
    if 0 <= position < size - 1:
        return read_zeros(position, size)
    return [(0 if position < 0 else size - 1, 1.0, 0.0)]


def axis_of_box(case: Case, low: float, high: float, k: int) -> tuple[float, list]:
    """The size of a box on one axis; and of its k bins the positions of all samples, unshifted."""
    scale, samples = case.spatial_scale, case.samples_per_bin
    if case.sampling == "bins":
        first, last = half_away(low * scale), half_away(high * scale)
        size = max(last - first + 1, 1)
        cells = [range(size) for _ in range(k)]
        inside = [
            [p for p in cells[i] if math.floor(i * size / k) <= p < math.ceil((i + 1) * size / k)]
            for i in range(k)
        ]
        return size, [[first + p for p in bin] for bin in inside]
    if case.sampling == "msra":
        start = half_away(low) * scale - 0.5
        size = max((half_away(high) + 1) * scale - 0.5 - start, 0.1)
        bin, shift = size / k, 0.0
    else:
        start = low * scale - 0.5
        size = high * scale - 0.5 - start
        bin, shift = size / k, 0.5
        if samples == 0:
            samples = max(math.ceil(bin), 0)
    return size, [
        [start + i * bin + (s + shift) * (bin / samples) for s in range(samples)] for i in range(k)
    ]


def samples_read(case: Case, positions: list[float], size: int) -> tuple[list[Read], int]:
    """The pixels that the samples of a bin read on one axis, and how many its mean includes."""
    if case.sampling == "bins":
        return [read_zeros(p, size) for p in positions], len(positions)
    if case.sampling == "msra":
        kept = [read_clamped(p, size) for p in positions if -0.5 <= p <= size - 0.5]
        return kept, len(kept)
    return [read_clamped(p, size) if -1 <= p <= size else [] for p in positions], len(positions)


def naive(case: Case, grad_output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values and gradients, one number at a time."""
    _, _, height, width = case.input.shape
    ph, pw = case.output_size
    shape = case.output_size_of()
    maps, boxes, grads = case.input.tolist(), case.boxes.tolist(), grad_output.tolist()
    offset = None if case.offset is None else case.offset.tolist()
    groups = 1 if offset is None else len(offset[0]) // 2
    output = torch.zeros(shape, dtype=torch.float64)
    grad_input = torch.zeros_like(case.input)
    grad_offset = None if case.offset is None else torch.zeros_like(case.offset)

    for r, (image, x1, y1, x2, y2) in enumerate(boxes):
        box_height, rows = axis_of_box(case, y1, y2, ph)
        box_width, columns = axis_of_box(case, x1, x2, pw)
        for g, i, j in itertools.product(range(groups), range(ph), range(pw)):
            dy = dx = 0.0
            if offset is not None:
                part = i * len(offset[r][0]) // ph, j * len(offset[r][0][0]) // pw
                dx = case.gamma * offset[r][2 * g][part[0]][part[1]] * box_width
                dy = case.gamma * offset[r][2 * g + 1][part[0]][part[1]] * box_height
            at_y, number_y = samples_read(case, [y + dy for y in rows[i]], height)
            at_x, number_x = samples_read(case, [x + dx for x in columns[j]], width)
            number = max(number_y * number_x, 1)
            per_group = shape[1] // groups
            for c in range(g * per_group, (g + 1) * per_group):
                channel = (c * ph + i) * pw + j if case.position_sensitive else c
                plane, grad = maps[int(image)][channel], grads[r][c][i][j] / number
                for y_read, x_read in itertools.product(at_y, at_x):
                    for (y, wy, sy), (x, wx, sx) in itertools.product(y_read, x_read):
                        output[r, c, i, j] += wy * wx * plane[y][x] / number
                        grad_input[int(image), channel, y, x] += wy * wx * grad
                        if grad_offset is not None:
                            slope = case.gamma * plane[y][x] * grad
                            at = (r, slice(2 * g, 2 * g + 2), *part)
                            grad_offset[at] += torch.tensor(
                                [slope * wy * sx * box_width, slope * sy * wx * box_height],
                                dtype=torch.float64,
                            )
    results = {"output": output, "grad_input": grad_input}
    return results if grad_offset is None else {**results, "grad_offset": grad_offset}
