"""Commands that bring weights in and out."""

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tyro.conf import Positional

from deformnet.recipes import DeformLayers

if TYPE_CHECKING:
    from deformnet.models.backbones.foreign import Converted


def export(run: Positional[Path], out: Positional[Path]) -> None:
    """Write a trained network as OUT.safetensors, and OUT.json that says what it is.

    The file can be used in the place of the run folder, to predict and as --init.

    Args:
        run: Run folder.
        out: File to write, NAME.safetensors; recipe, scores and versions go into NAME.json.
    """
    from deformnet.engine.export import export_run

    card = export_run(run, out)
    print(f"weights in {out}, their card in {card}")


def mmdetection(
    file: Positional[Path],
    out: Positional[Path],
    *,
    bgr: bool = False,
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375),
) -> None:
    """Take the ResNet out of a checkpoint of mmdetection or mmsegmentation.

    For models with style="caffe": --bgr --pixel-mean 103.53 116.28 123.675 --pixel-std 1 1 1.

    Args:
        file: Checkpoint, .pth or .safetensors.
        out: File to write, NAME.safetensors.
        bgr: The network saw BGR, not RGB.
        pixel_mean: What was subtracted from pixels of 0 to 255, in the order of the channels.
        pixel_std: What they were divided by.
    """
    from deformnet.models.backbones.foreign import from_mmdetection, read_checkpoint

    checkpoint = read_checkpoint(file)
    _keep(from_mmdetection(checkpoint, bgr=bgr, pixel_mean=pixel_mean, pixel_std=pixel_std), out)


def detectron2(
    file: Positional[Path],
    out: Positional[Path],
    *,
    bgr: bool = True,
    pixel_mean: tuple[float, float, float] = (103.53, 116.28, 123.675),
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Take the ResNet out of a checkpoint of detectron2 or maskrcnn-benchmark.

    Args:
        file: Checkpoint, .pth or .safetensors.
        out: File to write, NAME.safetensors.
        bgr: The network saw BGR, not RGB (INPUT.FORMAT).
        pixel_mean: MODEL.PIXEL_MEAN.
        pixel_std: MODEL.PIXEL_STD.
    """
    from deformnet.models.backbones.foreign import from_detectron2, read_checkpoint

    checkpoint = read_checkpoint(file)
    _keep(from_detectron2(checkpoint, bgr=bgr, pixel_mean=pixel_mean, pixel_std=pixel_std), out)


def _keep(converted: "Converted", out: Path) -> None:
    """Writes the backbone of a foreign checkpoint, and says what it is and how to go on."""
    from deformnet.engine.export import write_weights

    write_weights(converted.state, out)
    print(f"{converted.backbone}: {len(converted.state)} tensors in {out}")
    for reason, keys in converted.left_out.items():
        print(f"left out, {reason}: {len(keys)} ({keys[0]}{', ...' if len(keys) > 1 else ''})")
    layers = converted.deform_layers
    found = "none"
    if layers:
        found = (
            f"{len(converted.deformable)} among the last {layers} 3x3 convolutions, "
            f"offset_groups={converted.offset_groups}, modulated={converted.modulated}"
        )
    print(f"deformable layers: {found}")
    if converted.backbone in ("ResNet-50", "ResNet-101"):
        print(
            "strides: the file does not say where they are; weights of style='caffe' and of "
            "STRIDE_IN_1X1 need --stride-in-1x1"
        )
    depth = converted.backbone.removeprefix("ResNet-")
    if layers in get_args(DeformLayers):
        options = [f"--backbone resnet{depth}", f"--deform-layers {layers}"]
        if layers:
            options.append(f"--offset-groups {converted.offset_groups}")
            options += ["--modulated"] * converted.modulated
        print(f"next: deformnet train rfcn {' '.join(options)} --init {out} --data DIR --out RUN")
    else:
        print(
            f"next, in Python: resnet({depth}, deform_layers={layers}, "
            f"offset_groups={converted.offset_groups}, modulated={converted.modulated}, "
            f'weights="{out}"); recipes have {get_args(DeformLayers)} deformable layers'
        )
