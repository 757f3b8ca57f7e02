"""Label maps drawn from polygons and COCO's RLE."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deformnet._errors import UserError
from deformnet.data.base import IGNORE
from deformnet.data.files import Size

MAX_CLASSES = IGNORE - 1
"""Maximum number of object classes in an 8-bit label map, in addition to background and void."""

BACKGROUND = "background"


class Stamp(NamedTuple):
    """A mask of a part of an image."""

    x: int
    y: int
    mask: np.ndarray
    """bool [h, w]; its first pixel is (x, y) of the image."""


class Region(NamedTuple):
    """Pixels of an object: polygons, and masks of parts of the image."""

    label: int
    polygons: Sequence[np.ndarray] = ()
    """float [n, 2] each: x, y in pixels, where (0, 0) is the corner of the first pixel."""
    stamps: Iterable[Stamp] = ()
    """Iterated over once, when drawn: the stamps of all objects may not fit in memory."""


def with_background(names: Sequence[str], origin: object) -> tuple[str, ...]:
    """Classes of label maps: the background and the classes of the objects.

    Args:
        names: classes of the objects. If they begin with a background, it is not repeated.
        origin: file with the names, for messages.
    Raises:
        UserError: if there are more classes than a label map can hold.
    """
    objects = names[1:] if names and names[0] == BACKGROUND else names
    if len(objects) > MAX_CLASSES:
        raise UserError(
            f"{origin}: expected at most {MAX_CLASSES} object classes, the maximum of 8-bit masks, "
            f"but got {len(objects)}"
        )
    return BACKGROUND, *objects


def draw(size: Size, regions: Iterable[Region]) -> Tensor:
    """Draws a label map: void regions first, then the others in order, over earlier ones.

    Pixels that no region covers are 0, the background.

    Args:
        size: height and width.
    Returns:
        uint8 [H, W]
    """
    labels = np.zeros(size, np.uint8)
    for region in sorted(regions, key=lambda region: region.label != IGNORE):
        _draw_polygons(labels, region)
        for x, y, mask in region.stamps:
            top, left = max(0, -y), max(0, -x)
            target = labels[max(0, y) :, max(0, x) :]
            mask = mask[top : top + target.shape[0], left : left + target.shape[1]]
            target[: mask.shape[0], : mask.shape[1]][mask] = region.label
    return torch.from_numpy(labels)


def _draw_polygons(labels: np.ndarray, region: Region) -> None:
    """Draws the union of the polygons of a region, as pycocotools does."""
    from faster_coco_eval.core import mask as rle

    height, width = labels.shape
    # The time and memory of drawing a line depend on its length: far points are moved nearer.
    far = 2 * (width + height)
    polygons = [points.clip(-far, far) for points in region.polygons if len(points) >= 3]
    if not polygons:
        return
    points = np.concatenate(polygons)
    # Only the part of the image that contains the region: large images have many small objects.
    x1, y1 = np.floor(points.min(0).clip(0)).astype(int).tolist()
    x2, y2 = np.ceil(points.max(0).clip(max=(width, height)) + 1).astype(int).tolist()
    part = labels[y1 : max(y2, 0), x1 : max(x2, 0)]
    if not part.size:
        return
    rings = [(points - (x1, y1)).ravel().tolist() for points in polygons]
    height, width = part.shape
    coded = rle.segmToRle(rings, width, height)  # pyright: ignore[reportArgumentType] (its hint)
    part[rle.decode(coded).astype(bool)] = region.label


# Packed COCO segmentations: as lists of numbers, those of train2017 take gigabytes.

_POLYGONS, _RUNS = b"p", b"r"


def pack(segmentation: object) -> bytes | None:
    """Packs a COCO segmentation (polygons, or RLE with its size) into bytes; None if it is
    malformed."""
    match segmentation:
        case list():
            rings = [_ring(ring) for ring in segmentation]
            if any(ring is None for ring in rings):
                return None
            parts = [part for ring in rings if ring is not None for part in (ring, _END)]
            return _POLYGONS + b"".join(part.tobytes() for part in parts)
        case {"size": [int(height), int(width)], "counts": list() | str() as counts}:
            runs = _parse_runs(counts) if isinstance(counts, str) else _run_list(counts)
            if runs is None or int(runs.sum()) != height * width or height * width >= 2**31:
                return None
            return _RUNS + np.array([height, width], np.int32).tobytes() + runs.tobytes()
    return None


def unpack(packed: bytes, label: int, size: Size) -> Region | None:
    """The region of a packed segmentation; None if it was made for an image of another size."""
    kind, content = packed[:1], packed[1:]
    if kind == _POLYGONS:
        points = np.frombuffer(content, np.float32).reshape(-1, 2)
        ends = np.flatnonzero(np.isnan(points[:, 0]))
        rings = [ring[~np.isnan(ring[:, 0])] for ring in np.split(points, ends)]
        return Region(label, [ring.astype(np.float64) for ring in rings])
    height, width, *_ = numbers = np.frombuffer(content, np.int32)
    if (height, width) != size:
        return None
    return Region(label, stamps=_decoded(height, width, numbers[2:]))


def _decoded(height: int, width: int, runs: np.ndarray) -> Iterator[Stamp]:
    values = np.arange(len(runs)) % 2 == 1
    mask = np.repeat(values, runs).reshape(width, height).T  # in column-major order
    yield Stamp(0, 0, mask)


_END = np.full(2, np.nan, np.float32)


def _ring(ring: object) -> np.ndarray | None:
    """Coordinates of a polygon: float32 [2 n], finite."""
    if not isinstance(ring, list) or len(ring) % 2 or len(ring) < 6:
        return None
    if not all(isinstance(number, (int, float)) for number in ring):
        return None
    try:
        numbers = np.array(ring, np.float64)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return numbers.astype(np.float32) if np.abs(numbers).max() < 2**31 else None


def _run_list(counts: list[object]) -> np.ndarray | None:
    if all(isinstance(count, int) and 0 <= count < 2**31 for count in counts):
        return np.array(counts, np.int32)
    return None


def _parse_runs(text: str) -> np.ndarray | None:
    """Run lengths from COCO's compressed form: 5 bits a character, the lowest first, as differences
    to the run before the last one from the fourth run on."""
    runs: list[int] = []
    value, shift = 0, 0
    for character in text.encode(errors="replace"):
        digit = character - 48
        if not 0 <= digit < 64 or shift > 30:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return _run_list(list(runs)) if not shift else None
