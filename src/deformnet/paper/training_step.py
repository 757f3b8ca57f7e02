"""What deformable layers cost in training: a whole step, and every such layer alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_pool
from tqdm import tqdm

from deformnet._files import write_json
from deformnet.models.deeplab import DeepLab
from deformnet.models.detection.detector import Detector, Target
from deformnet.nn import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d, parameter_groups
from deformnet.ops import deform_ps_roi_pool
from deformnet.paper.cases import build, case, prepared
from deformnet.paper.measuring import (
    condition_lines,
    conditions,
    require_writable,
    running,
    side_by_side,
    spread,
)
from deformnet.paper.settings import Table4Network, TimingOptions

MOST = 1.5
"""What a deformable layer may cost at most, in times of the plain one."""

_LR = 1e-4  # small enough that a few steps change nothing that counts for time
_OBJECTS = 5  # in the image that detectors train on


def run_training_step(
    bench: TimingOptions, network: Table4Network, out: Path | None
) -> dict[str, Any]:
    """Measures a network, prints the result, and writes it into a file.

    A step is forward, loss, backward and SGD on one image. A layer is taken alone, forward and
    backward, with its inputs in the network: a deformable convolution together with the
    convolution that makes its offsets, beside the plain convolution of the other network; and
    deformable pooling, which pools twice, beside the plain pooling of the other network.

    Args:
        bench: how to measure.
        network: a row of Table 4.
        out: JSON file; None for none.
    Returns:
        What the file holds: {"conditions", "network", "image", "step", "layers"}, with the seconds
        of both networks and their "ratio" in "step" and in each of "layers".
    Raises:
        ValueError: if there is no such device, or `out` is a folder.
        FloatingPointError: if the loss is not finite.
    """
    require_writable(out)
    with running(bench) as device:
        found = conditions(bench)
        print("\n".join(condition_lines(found)), flush=True)
        measured = _measure(bench, network, device)
    print("\n".join(["", *_table(measured)]))
    report = {"conditions": found, **measured}
    if out is not None:
        write_json(out, report)
    return report


def _measure(bench: TimingOptions, network: Table4Network, device: torch.device) -> dict[str, Any]:
    with tqdm(disable=None, leave=False) as bar:
        bar.set_description("building")
        chosen = case(network, bench.backbone, bench.scale)
        photo = torch.randint(256, (3, *chosen.photo), dtype=torch.uint8)
        images = prepared(chosen, photo)[None].to(device, memory_format=torch.channels_last)
        plain, deformable = (model.train() for model in build(chosen, images))
        losses = _losses(plain, images), _losses(deformable, images)
        inputs = _layer_inputs(deformable, losses[1])
        bar.total = 1 + len(inputs)

        bar.set_description("the whole step")
        step = side_by_side(_step(plain, losses[0]), _step(deformable, losses[1]), bench)
        bar.update()
        layers = []
        for name, given in inputs.items():
            bar.set_description(name)
            layer = deformable.get_submodule(name)
            times = side_by_side(
                _both_ways(_plain(name, layer, plain), given), _both_ways(layer, given), bench
            )
            shapes = [list(tensor.shape) for tensor in given]
            layers.append({"name": name, "kind": type(layer).__name__, "inputs": shapes, **times})
            bar.update()
    return {"network": network, "image": list(images.shape[2:]), "step": step, "layers": layers}


def _losses(model: DeepLab | Detector, images: Tensor) -> Callable[[], Tensor]:
    """The sum of the network's losses on images [N, 3, H, W], with random truth."""
    height, width = images.shape[2:]
    if isinstance(model, DeepLab):
        target = torch.randint(model.num_classes, (len(images), height, width)).to(images.device)
        return lambda: _sum(model.losses(model(images), target))
    start = torch.rand(_OBJECTS, 2) * 0.5
    corners = torch.cat([start, start + 0.1 + torch.rand(_OBJECTS, 2) * 0.4], dim=1)
    boxes = (corners * torch.tensor([width, height] * 2)).to(images.device)
    labels = torch.arange(_OBJECTS, device=images.device) % model.num_classes
    targets = [Target(boxes, labels)] * len(images)
    return lambda: _sum(model.losses(images, [(height, width)] * len(images), targets))


def _sum(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _step(model: nn.Module, losses: Callable[[], Tensor]) -> Callable[[], None]:
    """A step of training."""
    optimizer = torch.optim.SGD(parameter_groups(model, _LR), lr=_LR, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        losses().backward()
        optimizer.step()

    return step


def _layer_inputs(
    model: DeepLab | Detector, losses: Callable[[], Tensor]
) -> dict[str, tuple[Tensor, ...]]:
    """What each deformable layer is given in training, by its name.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    found: dict[str, tuple[Tensor, ...]] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs

        return keep

    hooks = [
        layer.register_forward_pre_hook(keeper(name))
        for name, layer in model.named_modules()
        if isinstance(layer, (DeformConv2d, DeformRoIPool2d, DeformPSRoIPool2d))
    ]
    with torch.no_grad():
        loss = losses()
    for hook in hooks:
        hook.remove()
    if not loss.isfinite():
        raise FloatingPointError(f"the loss of the deformable network is {float(loss)}")
    return found


def _plain(name: str, layer: nn.Module, twin: nn.Module) -> Callable[..., Tensor]:
    """What the plain network has in the place of a deformable layer."""
    if isinstance(layer, DeformRoIPool2d):
        return lambda input, boxes: roi_pool(input, boxes, layer.output_size, layer.spatial_scale)
    if isinstance(layer, DeformPSRoIPool2d):
        return lambda maps, features, boxes: deform_ps_roi_pool(
            maps, boxes, None, layer.output_size, layer.spatial_scale, sampling=layer.sampling
        )
    return twin.get_submodule(name)


def _both_ways(call: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward, and backward to the maps that are given and to the parameters."""
    *maps, last = (tensor.detach().clone() for tensor in given)
    boxes = [last] if maps else []  # of a convolution, the only input is a map
    maps = [tensor.requires_grad_() for tensor in maps or [last]]
    wanted = [*maps, *(call.parameters() if isinstance(call, nn.Module) else ())]
    with torch.no_grad():
        gradient = torch.randn_like(call(*maps, *boxes))

    def run() -> object:
        # Plain pooling has no use for the features that offsets are made from.
        return torch.autograd.grad(call(*maps, *boxes), wanted, gradient, allow_unused=True)

    return run


def _table(measured: dict[str, Any]) -> list[str]:
    height, width = measured["image"]
    step, layers = measured["step"], measured["layers"]
    names = [f"{layer['name']} ({layer['kind']})" for layer in layers]
    wide = max(map(len, names))
    lines = [
        f"{measured['network']}, {height}x{width}, 1 image; milliseconds",
        f"{'':{wide}}  {'plain':>9}  {'deformable':>10}  ratio",
        _line(f"{'a whole step':{wide}}", step),
    ]
    lines.append("each layer alone, forward and backward")
    for name, layer in zip(names, layers, strict=True):
        above = f"  above {MOST}" if layer["ratio"]["median"] > MOST else ""
        lines.append(_line(f"{name:{wide}}", layer) + above)
    return lines


def _line(name: str, times: dict[str, Any]) -> str:
    plain, deformable = (1e3 * times[which]["median"] for which in ("plain", "deformable"))
    return f"{name}  {plain:9.1f}  {deformable:10.1f}  {spread(times['ratio'])}"
