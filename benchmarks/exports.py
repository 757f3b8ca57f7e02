"""Layers and whole networks, exported to ONNX and run by onnxruntime, compared with PyTorch.

    python -m benchmarks.exports IMAGES [RUN ...] [--rounds 7] [--no-layers]

Layers and networks have random weights and dynamic batch size, height and width (detectors take one
image at a time); RUNs are trained networks. They are compared on input sizes other than those at
export: on random tensors for layers and networks that return logits, and on the first twenty images
in the folder IMAGES for detectors. Differences are relative to the largest output or, for boxes, in
pixels of the image and of the network's input, the resized image. Times are measured on one
thread, in alternation; those of networks include resizing the image. Prints a Markdown table.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deformnet
from deformnet import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from deformnet.engine.export import Facts, write_export
from deformnet.engine.runs import TrainedRun, machine
from deformnet.engine.settings import WholeOptions
from deformnet.engine.whole import export_whole
from deformnet.models.detection.detector import Detections
from deformnet.ops import deform_conv2d
from deformnet.paper.timing import Timing, compare
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
    RPNRecipe,
)
from deformnet.tasks import DataIdentity, find_images
from deformnet.tasks.images import as_image
from deformnet.tasks.predictor import Predictor

CHANNELS = 32
IMAGES = 20
_MAPS = {0: "batch", 2: "height", 3: "width"}
# At initialization, all scores are nearly equal and all offsets are zero.
_SCALES = {
    "offset": 0.02,
    "rpn.classifier": 0.1,
    "rpn.regressor": 0.03,
    "score_maps": 0.1,
    "refiner": 0.03,
    "box_maps": 0.03,
    "classifier": 0.1,
    "fc.": 0.3,
}


def random_run(recipe: Recipe, classes: Sequence[str]) -> TrainedRun:
    """A network with random weights other than its initialization, as a trained run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = recipe.build_model(len(classes)).eval()
        for name, parameter in model.named_parameters():
            scale = next((scale for part, scale in _SCALES.items() if part in name), None)
            if scale is not None and parameter.ndim > 1:
                nn.init.normal_(parameter, std=scale)
    return TrainedRun(recipe, model, DataIdentity(tuple(classes), 5, "0" * 64))


class BorderOf2017(nn.Module):
    """Deformable convolution with `border="msra2017"`, which ONNX's DeformConv does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_offset = nn.Conv2d(CHANNELS, 18, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3) / 17)

    def forward(self, maps: Tensor) -> Tensor:
        offset = self.conv_offset(maps)
        return deform_conv2d(maps, offset, self.weight, padding=1, border="msra2017")


class PositionSensitive(nn.Module):
    """Position-sensitive pooling of maps, with offsets from the same maps."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = DeformPSRoIPool2d(CHANNELS, 4, 1 / 16, offset_groups=2)

    def forward(self, maps: Tensor, boxes: Tensor) -> Tensor:
        return self.pool(maps, maps, boxes)


def convolutions() -> dict[str, nn.Module]:
    """Layers that take maps [N, CHANNELS, H, W]."""
    c = CHANNELS
    return {
        "`DeformConv2d`, 3x3": DeformConv2d(c, c, 3, padding=1),
        "stride 2, two groups": DeformConv2d(c, c, 3, 2, 1, groups=2),
        "four offset groups": DeformConv2d(c, c, 3, padding=1, offset_groups=4),
        "modulated": DeformConv2d(c, c, 3, padding=1, modulated=True),
        "3x2, dilation 2, no bias": DeformConv2d(c, c, (3, 2), 1, 2, 2, bias=False),
        "`max_offset=2`": DeformConv2d(c, c, 3, padding=1, max_offset=2),
        '`offset_conv="separable"`': DeformConv2d(c, c, 3, padding=1, offset_conv="separable"),
        "float16": DeformConv2d(c, c, 3, padding=1).half(),
        '`border="msra2017"`': BorderOf2017(),
    }


def pools() -> dict[str, nn.Module]:
    """Layers that take maps [N, CHANNELS, H, W] and boxes [R, 5]."""
    aligned = {"sampling": "aligned", "samples_per_bin": 2}
    return {
        '`DeformRoIPool2d`, "bins"': DeformRoIPool2d(CHANNELS, 7, 1 / 16),
        '`DeformRoIPool2d`, "aligned"': DeformRoIPool2d(CHANNELS, 7, 1 / 16, **aligned),
        '`DeformPSRoIPool2d`, "bins"': PositionSensitive(),
    }


class Row(NamedTuple):
    """A row of a table."""

    name: str
    difference: str
    size: int
    times: dict[str, Timing]

    def __str__(self) -> str:
        pytorch, onnx = self.times.values()
        ratio = onnx.relative_to(pytorch)
        spread = f"{ratio.median:.2f} ({ratio.quantile(0.2):.2f} to {ratio.quantile(0.8):.2f})"
        size = f"{self.size / 1000:,.0f}"
        times = (f"{time.median * 1000:.1f}" for time in (pytorch, onnx))
        return f"| {' | '.join((self.name, self.difference, size, *times, spread))} |"


@torch.no_grad()
def layer_row(name: str, layer: nn.Module, *, boxes: bool, rounds: int) -> Row:
    """Exports a layer, and compares it on maps of two other sizes."""
    for key, parameter in layer.eval().named_parameters():
        if "offset" in key:
            nn.init.normal_(parameter, std=0.2)
    dtype = next(layer.parameters()).dtype
    exported = torch.onnx.export(
        layer,
        _inputs(2, 21, dtype, boxes),
        dynamo=True,
        dynamic_shapes=(_MAPS, {0: "boxes"}) if boxes else (_MAPS,),
        verbose=False,
    )
    assert exported is not None
    content = exported.model_proto.SerializeToString()
    run = _in_onnxruntime(content)
    worst = 0.0
    for batch, size in ((1, 17), (3, 30)):
        inputs = _inputs(batch, size, dtype, boxes)
        worst = max(worst, _relative(run(*inputs), layer(*inputs)))
    inputs = _inputs(1, 56, dtype, boxes)
    times = compare(
        {"PyTorch": lambda: layer(*inputs), "ONNX": lambda: run(*inputs)}, rounds=rounds
    )
    return Row(name, f"{worst:.0e}", len(content), times)


def _inputs(batch: int, size: int, dtype: torch.dtype, boxes: bool) -> tuple[Tensor, ...]:
    maps = torch.randn(batch, CHANNELS, size, size + 4).to(dtype)
    if not boxes:
        return (maps,)
    count, side = 100 * batch, 16.0 * size
    corners = torch.rand(count, 2, 2).sort(dim=1).values.flatten(1) * side
    return maps, torch.cat((torch.randint(batch, (count, 1)), corners), dim=1)


def _in_onnxruntime(content: bytes) -> Callable[..., Tensor]:
    import onnxruntime  # not at the top, since tests without it import this module

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    names = [it.name for it in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        arrays = (it.numpy() for it in inputs)
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return run


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def networks() -> dict[str, TrainedRun]:
    """ResNet-18 networks with random weights, for a shorter side of 320 pixels and 20 classes."""
    small: dict[str, Any] = {"init": None, "backbone": "resnet18"}
    sizes = {"short_side": 320, "max_side": 512}
    recipes: dict[str, Recipe] = {
        "classifier": ClassifierRecipe(**small, crop=224),
        "DeepLab": DeepLabRecipe(**small, **sizes),
        "class-agnostic RPN": RPNRecipe(**small, **sizes),
        "class-aware RPN": ClassAwareRPNRecipe(**small, **sizes),
        "Faster R-CNN": FasterRCNNRecipe(**small, **sizes),
        "R-FCN": RFCNRecipe(**small, **sizes),
    }
    classes = [f"class {i}" for i in range(20)]
    return {name: random_run(recipe, classes) for name, recipe in recipes.items()}


@torch.no_grad()
def network_row(name: str, run: Path, images: Sequence[Path], rounds: int) -> Row:
    """Exports a run, and compares the exported predictor with that of the run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        export_whole(run, file, WholeOptions())
        size = file.stat().st_size
        onnx, pytorch = deformnet.load(file), deformnet.load(run, device="cpu")
    difference = _of_boxes if pytorch.has_boxes else _of_logits
    times = compare(
        {"PyTorch": lambda: pytorch(images[0]), "ONNX": lambda: onnx(images[0])}, rounds=rounds
    )
    return Row(name, difference(onnx, pytorch, images), size, times)


def distances(found: Detections, expected: Detections) -> Tensor:
    """Distance in pixels from each box to the nearest box of the same class in the other set.

    Boxes are not compared in order: if scores are equal up to rounding, their order may change, and
    so may the one of two boxes that suppresses the other.
    """
    apart = (found.boxes[:, None] - expected.boxes).abs().amax(dim=2)
    apart[found.labels[:, None] != expected.labels] = torch.inf
    return torch.cat([apart.amin(dim=0), apart.amin(dim=1)])


def _of_boxes(onnx: Predictor, pytorch: Predictor, images: Sequence[Path]) -> str:
    """The largest of the `distances`, in pixels and relative to the longer side of the box.

    Pixels are those of the image and of the network's input. Boxes farther apart than a pixel of
    the image are excluded and counted.
    """
    nearest, resized, relative = [], [], []
    for image in images:
        found, expected = onnx(image), pytorch(image)
        apart = distances(found, expected)
        boxes = torch.cat([expected.boxes, found.boxes])  # in the order of `apart`
        nearest.append(apart)
        resized.append(apart * max(pytorch.prepare(as_image(image)).scale))
        relative.append(apart / (boxes[:, 2:] - boxes[:, :2]).amax(dim=1))
    near = torch.cat(nearest) < 1
    others = "" if near.all() else f", excluding {(~near).sum()} of {len(near)} boxes"
    worst, of_input, of_side = (
        torch.cat(values)[near].max() for values in (nearest, resized, relative)
    )
    return f"{worst:.1e} px ({of_input:.1e} px of the input, {of_side:.0e} of the side){others}"


def _of_logits(onnx: Predictor, pytorch: Predictor, images: Sequence[Path]) -> str:
    worst = 0.0
    for batch, height, width in ((3, 96, 160), (1, 352, 224)):
        pixels = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
        normalized = (pixels / 255 - _channels(IMAGENET_MEAN)) / _channels(IMAGENET_STD)
        worst = max(worst, _relative(onnx.model(normalized), pytorch.model(normalized)))
    return f"{worst:.0e}"


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("runs", type=Path, nargs="*", help="trained networks, besides random ones")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = options.rounds
    print(f"{machine()}, medians of {rounds} rounds (20% to 80%)\n")
    print("| | largest difference | kB | PyTorch, ms | ONNX, ms | ONNX / PyTorch |")
    print("|---|---|---|---|---|---|")
    if options.layers:
        for name, layer in convolutions().items():
            print(layer_row(name, layer, boxes=False, rounds=rounds), flush=True)
        for name, layer in pools().items():
            print(layer_row(name, layer, boxes=True, rounds=rounds), flush=True)
    images = [file.path for file in find_images([options.images])][:IMAGES]
    with tempfile.TemporaryDirectory() as folder:
        for name, run in networks().items():
            weights = Path(folder) / f"{name}.safetensors"
            write_export(run, Facts({}, {}), weights)
            print(network_row(name, weights, images, rounds), flush=True)
    for run in options.runs:
        print(network_row(run.name, run, images, rounds), flush=True)


if __name__ == "__main__":
    main()
