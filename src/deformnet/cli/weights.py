"""Commands that convert weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from deformnet._errors import UserError
from deformnet._files import refuse_overwrite
from deformnet.cli.options import GROUP, RunPath
from deformnet.engine.settings import SUFFIXES, WholeOptions

if TYPE_CHECKING:
    from deformnet.models.backbones.foreign import Converted

_File = Annotated[Positional[Path], tyro.conf.arg(metavar="FILE")]
_Checkpoint = Annotated[Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]


def export(
    run: RunPath,
    file: _File,
    *,
    whole: Annotated[WholeOptions, GROUP] = WholeOptions(),  # noqa: B008 (frozen)
) -> None:
    """Export a trained network to NAME.safetensors, NAME.onnx or NAME.pt2.

    NAME.safetensors contains the weights; NAME.json and NAME.md describe them. It can be used
    instead of the run folder, for prediction and as --init. NAME.md is a model card (README.md for
    model.safetensors); add the license of the weights to it.

    NAME.onnx and NAME.pt2 contain the whole network for other programs. For detectors, this
    includes proposals, box decoding and non-maximum suppression. `deformnet predict` accepts them
    as well.

    Args:
        run: Run folder.
        file: File to write. For NAME.safetensors, the recipe, scores and versions are written to
            NAME.json.
        whole: Options for NAME.onnx and NAME.pt2.
    """
    if file.suffix in SUFFIXES:
        from deformnet.engine.whole import export_whole

        export_whole(run, file, whole)
        imports = file.suffix == ".pt2" and not whole.standard
        print(f"network in {file}{'; it runs after `import deformnet`' if imports else ''}")
        return
    if whole != WholeOptions():
        raise UserError(f"expected NAME.onnx or NAME.pt2 with these options, but got {file}")
    if file.suffix != ".safetensors":
        raise UserError(f"out: expected NAME.safetensors, NAME.onnx or NAME.pt2, but got {file}")
    from deformnet.engine.export import export_run, model_card_path

    card = export_run(run, file)
    print(f"weights in {file}, description in {card} and {model_card_path(file)}")


def mmdetection(
    checkpoint: _Checkpoint,
    file: _File,
    *,
    bgr: bool = False,
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375),
) -> None:
    """Extract the ResNet from a checkpoint of mmdetection or mmsegmentation.

    For models with style="caffe": --bgr --pixel-mean 103.53 116.28 123.675 --pixel-std 1 1 1.

    Args:
        checkpoint: Checkpoint, .pth or .safetensors.
        file: File to write, NAME.safetensors.
        bgr: The network was trained on BGR images, not RGB.
        pixel_mean: Mean subtracted from pixel values (0 to 255), in channel order.
        pixel_std: Standard deviation that pixel values are divided by, in channel order.
    """
    from deformnet.models.backbones.foreign import from_mmdetection, read_checkpoint

    refuse_overwrite(file, [checkpoint])
    content = read_checkpoint(checkpoint)
    _write(from_mmdetection(content, bgr=bgr, pixel_mean=pixel_mean, pixel_std=pixel_std), file)


def detectron2(
    checkpoint: _Checkpoint,
    file: _File,
    *,
    bgr: bool = True,
    pixel_mean: tuple[float, float, float] = (103.53, 116.28, 123.675),
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Extract the ResNet from a checkpoint of detectron2 or maskrcnn-benchmark.

    Args:
        checkpoint: Checkpoint, .pth or .safetensors.
        file: File to write, NAME.safetensors.
        bgr: The network was trained on BGR images, not RGB (INPUT.FORMAT).
        pixel_mean: MODEL.PIXEL_MEAN.
        pixel_std: MODEL.PIXEL_STD.
    """
    from deformnet.models.backbones.foreign import from_detectron2, read_checkpoint

    refuse_overwrite(file, [checkpoint])
    content = read_checkpoint(checkpoint)
    _write(from_detectron2(content, bgr=bgr, pixel_mean=pixel_mean, pixel_std=pixel_std), file)


def _write(converted: "Converted", out: Path) -> None:
    """Writes a converted backbone, and prints a summary and the next command."""
    from deformnet.engine.export import write_weights

    write_weights(converted.state, out)
    print(f"{converted.backbone}: {len(converted.state)} tensors in {out}")
    for reason, keys in converted.ignored.items():
        print(f"skipped, {reason}: {len(keys)} ({keys[0]}{', ...' if len(keys) > 1 else ''})")
    layers = converted.deform_layers
    settings = f"offset_groups={converted.offset_groups}, modulated={converted.modulated}"
    count = f"{len(converted.deformable)} among the last {layers} 3x3 convolutions"
    print(f"deformable layers: {f'{count}, {settings}' if layers else 'none'}")
    if converted.backbone in ("ResNet-50", "ResNet-101"):
        print(
            "strides: not recorded in the file; weights of style='caffe' and of STRIDE_IN_1X1 need "
            "--stride-in-1x1"
        )
    depth = converted.backbone.removeprefix("ResNet-")
    options = [f"--backbone resnet{depth}", f"--deform-layers {layers}"]
    if layers:
        options.append(f"--offset-groups {converted.offset_groups}")
        options += ["--modulated"] * converted.modulated
    print(f"next: deformnet train rfcn {' '.join(options)} --init {out} --data DIR --out RUN")
