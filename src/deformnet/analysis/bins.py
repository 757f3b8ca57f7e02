"""Where the bins of deformable RoI pooling lie (Dai et al. 2017, Figure 7)."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deformnet.analysis.layers import evaluating, hooks_called
from deformnet.nn import DeformPSRoIPool2d, DeformRoIPool2d
from deformnet.ops.roi_pool.checks import join_boxes

RoIPool = DeformRoIPool2d | DeformPSRoIPool2d


class MovedBins(NamedTuple):
    """The bins of R boxes, as boxes x1 y1 x2 y2 in pixels of the image."""

    plain: Tensor
    """[R, ph, pw, 4]: the regular partition."""
    moved: Tensor
    """[R, G, ph, pw, 4]: where each offset group has its bins."""

    def of_groups(self, groups: Tensor) -> Tensor:
        """The moved bins [R, ph, pw, 4] of one offset group for each box: those that it is seen by.

        In an R-FCN whose offsets know the class, the group of a detection's class: 0 is the
        background's, k + 1 that of class k.

        Args:
            groups: integers [R], 0 to G - 1. Where all classes share one group, it is that one.
        Raises:
            ValueError: if it has another shape, or a group does not exist.
        """
        boxes, count = self.moved.shape[:2]
        if list(groups.shape) != [boxes]:
            raise ValueError(f"groups: wanted [{boxes}], got {list(groups.shape)}")
        if count == 1:
            return self.moved[:, 0]
        if boxes and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise ValueError(f"groups: wanted 0 to {count - 1}, got {groups.tolist()}")
        groups = groups.to(self.moved.device)
        return self.moved[torch.arange(boxes, device=groups.device), groups]


@torch.no_grad()
def moved_bins(
    model: nn.Module, layer: str, *inputs: Any, call: Callable[..., object] | None = None
) -> MovedBins:
    """The bins of a deformable RoI pooling layer in one call of a model, in evaluation mode.

    They are the exact parts of the boxes, whose last pixel "bins" and "msra" sampling count in, and
    they move as far as the layer moves them: by its offsets times the size that the rule of
    sampling gives to the box. (Of the map, "bins" then reads whole cells.)

    Args:
        model: any network that has the layer and calls it once.
        layer: its name in `model.named_modules()`.
        inputs: what the model is called with.
        call: what to call with them in the place of the model, such as a part of it whose inputs
            are known from an earlier run.
    Raises:
        ValueError: if there is no such layer, if it is another kind of layer, or if the model does
            not call it exactly once.
    """
    pools = roi_pools(model)
    if layer not in pools:
        raise ValueError(
            f"layer: wanted one of {', '.join(pools) or '(the model has none)'}, got {layer!r}"
        )
    found: list[MovedBins] = []

    def see(done: PoolCall) -> None:
        found.append(bins_in(done))  # at once: the model may go on to change boxes in place

    with watching_pools({layer: pools[layer]}, see), evaluating(model):
        (call or model)(*inputs)
    if len(found) != 1:
        raise ValueError(f"layer: wanted {layer} to be called once, got {len(found)} calls")
    return found[0]


class PoolCall(NamedTuple):
    """One call of a deformable RoI pooling layer.

    Attributes:
        name: of the layer, in `model.named_modules()`.
        features: what its offsets come from, [N, C, H, W].
        boxes: [R, 5], in pixels of the image.
    """

    name: str
    pool: RoIPool
    features: Tensor
    boxes: Tensor


def roi_pools(model: nn.Module) -> dict[str, RoIPool]:
    """The deformable RoI pooling layers of a model, by name."""
    return {name: pool for name, pool in model.named_modules() if isinstance(pool, RoIPool)}


@contextmanager
def watching_pools(pools: Mapping[str, RoIPool], see: Callable[[PoolCall], None]) -> Iterator[None]:
    """Shows every call of some layers to `see`, when it is done."""

    def note(name: str, pool: RoIPool) -> Callable[..., None]:
        signature = inspect.signature(pool.forward)

        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            # "maps" come before in position-sensitive pooling.
            features, boxes = signature.bind(*args, **kwargs).args[-2:]
            if not isinstance(boxes, Tensor):
                boxes = join_boxes(boxes, features)
            see(PoolCall(name, pool, features, boxes))

        return hook

    handles = [
        pool.register_forward_hook(note(name, pool), with_kwargs=True)
        for name, pool in pools.items()
    ]
    try:
        with hooks_called():
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def bins_in(call: PoolCall) -> MovedBins:
    """Where the bins lie in a call, by offsets that are made once more."""
    pool, boxes = call.pool, call.boxes
    offsets = pool.offsets(call.features, boxes).float()
    ph, pw = pool.output_size
    corners = boxes[:, 1:].to(torch.float64, copy=True)
    sizes = _measured(pool, corners).float()
    corners[:, 2:] += pool.sampling != "aligned"
    corners = corners.float()
    columns = torch.arange(pw, device=boxes.device) / pw
    rows = torch.arange(ph, device=boxes.device) / ph
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    starts = torch.stack([x, y], dim=-1)  # shares of the box
    ends = starts + torch.tensor([1 / pw, 1 / ph], device=boxes.device)
    shares = torch.stack([starts, ends], dim=-2)  # [ph, pw, start or end, (x, y)]
    origin = corners[:, None, None, None, :2]
    extent = (corners[:, 2:] - corners[:, :2])[:, None, None, None]
    plain = origin + shares * extent
    # [R, G, (x, y), ph, pw] to [R, G, ph, pw, (x, y)]
    shifts = offsets.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2) * pool.gamma
    moved = plain[:, None] + (shifts * sizes[:, None, None, None])[..., None, :]
    return MovedBins(plain.flatten(-2), moved.flatten(-2))


def _measured(pool: RoIPool, corners: Tensor) -> Tensor:
    """Width and height [R, 2] that offsets count in, in pixels of the image."""
    low, high, scale = corners[:, :2], corners[:, 2:], pool.spatial_scale
    if pool.sampling == "bins":
        return (_round(high * scale) - _round(low * scale) + 1).clamp(min=1) / scale
    if pool.sampling == "msra":
        return (_round(high) + 1 - _round(low)).clamp(min=0.1 / scale)
    return high - low


def _round(numbers: Tensor) -> Tensor:
    """To whole numbers, halves away from zero."""
    return numbers.sign() * (numbers.abs() + 0.5).floor()
