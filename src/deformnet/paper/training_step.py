"""Cost of deformable layers in training: a whole step, and each such layer alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torchvision.ops import roi_pool
from tqdm import tqdm

from deformnet._files import write_json
from deformnet._text import Table
from deformnet.models import Network
from deformnet.nn import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d, parameter_groups
from deformnet.ops import deform_ps_roi_pool
from deformnet.paper.cases import build, case
from deformnet.paper.measuring import (
    Comparison,
    Conditions,
    autocast,
    running,
    side_by_side,
    spread,
)
from deformnet.paper.settings import Table4Network, TimingOptions

_Losses = Callable[[], dict[str, Tensor]]

LIMIT = 1.5
"""Ratio to the plain layer above which the table marks a deformable layer."""

_LR = 1e-4  # so small that a few steps do not change the times


class LayerTimes(Comparison):
    """Times of a deformable layer alone."""

    name: str
    kind: str
    inputs: list[list[int]]


class Report(TypedDict):
    """Content of the JSON file."""

    conditions: Conditions
    network: Table4Network
    image: list[int]
    step: Comparison
    layers: list[LayerTimes]


def run_training_step(options: TimingOptions, network: Table4Network, out: Path | None) -> Report:
    """Measure a network in training, print the times as a table, and write them to a file.

    A step is forward, loss, backward and SGD on one image. A layer alone is forward and backward
    with the inputs that it has in the network: a deformable convolution with the convolution that
    makes its offsets, compared to the plain convolution; and deformable RoI pooling, which pools
    twice, compared to plain pooling.

    Raises:
        UserError: if there is no such device, or if `out` is a folder or a file other than
            earlier results.
        FloatingPointError: if the loss is not finite.
    """
    with running(options, out, Report.__required_keys__) as (device, conditions):
        report = _measure(options, network, device, conditions)
    print(f"\n{_table(report)}")
    if out is not None:
        write_json(out, report)
    return report


def _measure(
    options: TimingOptions, network: Table4Network, device: torch.device, conditions: Conditions
) -> Report:
    networks = build(case(network, options), device)
    images = networks.prepared.input
    plain, deformable = (
        cast(Network, it.model.train()) for it in (networks.plain, networks.deformable)
    )
    losses = plain.random_losses(images), deformable.random_losses(images)
    inputs = _layer_inputs(deformable, losses[1], options)
    steps = _step(plain, losses[0], options), _step(deformable, losses[1], options)
    step = side_by_side(*steps, options)
    layers: list[LayerTimes] = []
    for name, given in tqdm(inputs.items(), desc="layers", disable=None, leave=False):
        layer = deformable.get_submodule(name)
        baseline = _both_ways(_baseline(name, layer, plain), given, options)
        times = side_by_side(baseline, _both_ways(layer, given, options), options)
        shapes = [list(tensor.shape) for tensor in given]
        layers.append({"name": name, "kind": type(layer).__name__, "inputs": shapes, **times})
    return {
        "conditions": conditions,
        "network": network,
        "image": list(images.shape[2:]),
        "step": step,
        "layers": layers,
    }


def _sum(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _step(model: nn.Module, losses: _Losses, options: TimingOptions) -> Callable[[], None]:
    """Return a training step."""
    optimizer = torch.optim.SGD(parameter_groups(model, _LR), lr=_LR, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(options):
            loss = _sum(losses())
        loss.backward()
        optimizer.step()

    return step


def _layer_inputs(
    model: nn.Module, losses: _Losses, options: TimingOptions
) -> dict[str, tuple[Tensor, ...]]:
    """Return the inputs of each deformable layer in training, by its name.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    recorded: dict[str, tuple[Tensor, ...]] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        recorded[name] = inputs

    hooks = [
        layer.register_forward_pre_hook(partial(record, name))
        for name, layer in model.named_modules()
        if isinstance(layer, (DeformConv2d, DeformRoIPool2d, DeformPSRoIPool2d))
    ]
    with torch.no_grad(), autocast(options):
        loss = _sum(losses())
    for hook in hooks:
        hook.remove()
    if not loss.isfinite():
        raise FloatingPointError(f"the loss of the deformable network is {float(loss)}")
    return recorded


def _baseline(name: str, layer: nn.Module, plain: nn.Module) -> Callable[..., Tensor]:
    """Return what the plain network computes in place of a deformable layer."""
    if isinstance(layer, DeformRoIPool2d):
        size, scale = layer.output_size, layer.spatial_scale
        # As in `FasterRCNN`: torchvision expects input and boxes of the same dtype.
        return lambda input, boxes: roi_pool(input.to(boxes.dtype), boxes, size, scale).to(
            input.dtype
        )
    if isinstance(layer, DeformPSRoIPool2d):
        return lambda maps, features, boxes: deform_ps_roi_pool(
            maps, boxes, None, layer.output_size, layer.spatial_scale, sampling=layer.sampling
        )
    return plain.get_submodule(name)


def _both_ways(
    call: Callable[..., Tensor], given: tuple[Tensor, ...], options: TimingOptions
) -> Callable[[], object]:
    """Return a call forward, and backward to feature maps and parameters."""
    *maps, last = (tensor.detach().clone() for tensor in given)
    boxes = [last] if maps else []  # the only input of a convolution is a map
    maps = [tensor.requires_grad_() for tensor in maps or [last]]
    inputs = [*maps, *(call.parameters() if isinstance(call, nn.Module) else ())]
    with torch.no_grad(), autocast(options):
        gradient = torch.randn_like(call(*maps, *boxes))

    def run() -> object:
        with autocast(options):
            output = call(*maps, *boxes)
        # Plain pooling does not use the features from which offsets are computed.
        return torch.autograd.grad(output, inputs, gradient, allow_unused=True)

    return run


def _table(report: Report) -> Table:
    height, width = report["image"]
    rows = [("whole step", *_cells(report["step"]), "")]
    for layer in report["layers"]:
        mark = f"above {LIMIT}" if layer["ratio"]["median"] > LIMIT else ""
        rows.append((f"{layer['name']} ({layer['kind']})", *_cells(layer), mark))
    return Table(
        f"{report['network']}, {height}x{width}, 1 image; milliseconds forward and backward",
        ("", "plain", "deformable", "ratio", ""),
        rows,
    )


def _cells(times: Comparison) -> tuple[str, str, str]:
    plain, deformable = times["plain"]["median"], times["deformable"]["median"]
    return f"{1e3 * plain:.1f}", f"{1e3 * deformable:.1f}", spread(times["ratio"])
