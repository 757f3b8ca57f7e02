"""Bin locations of deformable RoI pooling (Dai et al. 2017, Figure 7)."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deformnet.analysis.layers import evaluating, hooks, the_only
from deformnet.nn import DeformPSRoIPool2d, DeformRoIPool2d
from deformnet.ops.roi_pool.checks import join_boxes

RoIPool = DeformRoIPool2d | DeformPSRoIPool2d


class BinLocations(NamedTuple):
    """Bins of R boxes, as boxes (x1, y1, x2, y2) in pixels of the image."""

    regular: Tensor
    """[R, ph, pw, 4], the regular grid."""
    deformed: Tensor
    """[R, G, ph, pw, 4], the bins of each offset group, shifted by their offsets."""

    def of_groups(self, groups: Tensor) -> Tensor:
        """Deformed bins [R, ph, pw, 4] of one offset group for each box.

        With the class-aware offsets of R-FCN this is the group of a detection's class: 0 for the
        background, k + 1 for class k.

        Args:
            groups: Integers [R], 0 to G - 1. If all classes share one group, its bins are returned.

        Raises:
            ValueError: If the shape is wrong, or a group does not exist.
        """
        boxes, count = self.deformed.shape[:2]
        if list(groups.shape) != [boxes]:
            raise ValueError(f"expected groups to be [{boxes}], but got {list(groups.shape)}")
        if count == 1:
            return self.deformed[:, 0]
        if boxes and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise ValueError(f"expected groups to be 0 to {count - 1}, but got {groups.tolist()}")
        groups = groups.to(self.deformed.device)
        return self.deformed[torch.arange(boxes, device=groups.device), groups]


@torch.no_grad()
def bin_locations(
    model: nn.Module, layer: str, *inputs: Any, call: Callable[..., object] | None = None
) -> BinLocations:
    """Bin locations of a deformable RoI pooling layer in a forward pass, in evaluation mode.

    The regular bins divide the boxes exactly; with "bins" and "msra" sampling, boxes include their
    last pixel. They are shifted by the offsets times the box size of the sampling rule. (The "bins"
    rule then samples whole pixels of the feature map.)

    Args:
        model: Model that calls the layer once.
        layer: Name of the layer in `model.named_modules()`.
        inputs: Arguments of the model.
        call: Function to call with these arguments in place of the model, such as a part of it
            whose inputs are known from an earlier pass.

    Raises:
        ValueError: If there is no such layer, it is not deformable RoI pooling, or the model does
            not call it exactly once.
    """
    pools = roi_pools(model)
    if layer not in pools:
        raise ValueError(
            f"expected layer to be one of {', '.join(pools) or '(the model has none)'}, "
            f"but got {layer!r}"
        )
    locations: list[BinLocations] = []

    def record(it: PoolCall) -> None:
        locations.append(locate_bins(it))  # now, as the model may modify the boxes in place

    with recording_pools({layer: pools[layer]}, record), evaluating(model):
        (call or model)(*inputs)
    return the_only(layer, locations)


class PoolCall(NamedTuple):
    """A call of a deformable RoI pooling layer.

    Attributes:
        name: Name of the layer in `model.named_modules()`.
        pool: The layer.
        features: Features [N, C, H, W] that the offsets are predicted from.
        boxes: [R, 5], in pixels of the image.
    """

    name: str
    pool: RoIPool
    features: Tensor
    boxes: Tensor


def roi_pools(model: nn.Module) -> dict[str, RoIPool]:
    """Deformable RoI pooling layers of a model, by name."""
    return {name: pool for name, pool in model.named_modules() if isinstance(pool, RoIPool)}


@contextmanager
def recording_pools(
    pools: Mapping[str, RoIPool], record: Callable[[PoolCall], None]
) -> Iterator[None]:
    """Pass every call of the layers to `record` when it returns."""

    def record_call(
        name: str, pool: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        # Position-sensitive pooling has "maps" as its first argument.
        features, boxes = inspect.signature(pool.forward).bind(*args, **kwargs).args[-2:]
        if not isinstance(boxes, Tensor):
            boxes = join_boxes(boxes, features)
        record(PoolCall(name, pool, features, boxes))

    with hooks() as handles:
        for name, pool in pools.items():
            hook = partial(record_call, name)
            handles.append(pool.register_forward_hook(hook, with_kwargs=True))
        yield


@torch.no_grad()
def locate_bins(call: PoolCall) -> BinLocations:
    """Bin locations of a call, whose offsets are computed again."""
    pool, boxes = call.pool, call.boxes
    offsets = pool.offsets(call.features, boxes).float()
    ph, pw = pool.output_size
    corners = boxes[:, 1:].to(torch.float64, copy=True)
    sizes = _offset_units(pool, corners).float()
    corners[:, 2:] += pool.sampling != "aligned"
    corners = corners.float()
    columns = torch.arange(pw, device=boxes.device) / pw
    rows = torch.arange(ph, device=boxes.device) / ph
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    starts = torch.stack([x, y], dim=-1)  # in fractions of the box
    ends = starts + torch.tensor([1 / pw, 1 / ph], device=boxes.device)
    fractions = torch.stack([starts, ends], dim=-2)  # [ph, pw, start or end, (x, y)]
    origin = corners[:, None, None, None, :2]
    extent = (corners[:, 2:] - corners[:, :2])[:, None, None, None]
    regular = origin + fractions * extent
    # [R, G, (x, y), ph, pw] to [R, G, ph, pw, (x, y)]
    shifts = offsets.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2) * pool.gamma
    deformed = regular[:, None] + (shifts * sizes[:, None, None, None])[..., None, :]
    return BinLocations(regular.flatten(-2), deformed.flatten(-2))


def _offset_units(pool: RoIPool, corners: Tensor) -> Tensor:
    """Unit of the offsets: width and height [R, 2] of the boxes by the sampling rule, in pixels."""
    low, high, scale = corners[:, :2], corners[:, 2:], pool.spatial_scale
    if pool.sampling == "bins":
        return (_round(high * scale) - _round(low * scale) + 1).clamp(min=1) / scale
    if pool.sampling == "msra":
        return (_round(high) + 1 - _round(low)).clamp(min=0.1 / scale)
    return high - low


def _round(numbers: Tensor) -> Tensor:
    """Round halves away from zero."""
    return numbers.sign() * (numbers.abs() + 0.5).floor()
