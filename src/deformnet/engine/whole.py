"""Export of whole trained networks to one file for other programs: NAME.onnx or NAME.pt2.

The file contains the network with its post-processing: proposals, box decoding and non-maximum
suppression are included, but softmax is left to the caller. It also contains the recipe, the
classes and the size of the images, so `load` returns a predictor for it, as for a run folder.

Inputs and outputs of the file:

```
images     uint8 [N, 3, H, W], RGB, resized; with normalize=False, float32 and normalized
logits     classifiers: float32 [N, C]; DeepLab: [N, C, H, W], or [N, C, h, w] with resize=False
boxes      detectors, N = 1: float32 [D, 4] (x1, y1, x2, y2), in pixels of `images`
scores     float32 [D], in descending order
labels     int64 [D], class indices, padded with -1; D is the recipe's `max_detections`
```

NAME.onnx uses the operator DeformConv of opset 19. NAME.pt2 uses deformnet's own operators, so it
needs `import deformnet`. With `standard`, NAME.onnx uses only operators of every ONNX runtime, and
NAME.pt2 only those of PyTorch (and torchvision's non-maximum suppression, for detectors).
"""

import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from deformnet._errors import UserError, require_extra
from deformnet._files import naming, parse_json, read_file, refuse_overwrite, write_file
from deformnet._hub import local
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from deformnet.engine.runs import describe, load_run, recipe_and_data, versions
from deformnet.engine.settings import WholeOptions
from deformnet.models import _tensors
from deformnet.ops import decompositions
from deformnet.tasks import task_of
from deformnet.tasks.base import TaskOptions, Whole
from deformnet.tasks.predictor import Predictor

_KEY = "deformnet"  # of the description in the metadata of a file
_DIGEST = "sha256"  # metadata key in .onnx; the records of .pt2 have checksums
_DIGEST_KEY = b"\n\x06sha256\x12@"  # that entry in the file, up to its value of 64 bytes
_NORMALIZATION = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_EXAMPLE = (96, 128)  # image size for tracing a network that takes any size


def export_whole(run: str | Path, out: str | Path, options: WholeOptions) -> None:
    """Exports a trained network as `.onnx` or `.pt2`; see `deformnet.engine.whole`.

    Args:
        run: run folder, or an exported .safetensors; see `load_run`.
        out: NAME.onnx or NAME.pt2.
        options: export options.
    Raises:
        FileNotFoundError, UserError: see `load_run`; UserError also if an option does not apply, or
            `out` is `run`.
        MissingExtraError: for NAME.onnx, if packages of the extra "onnx" are missing.
        OSError: if the file cannot be written.
    """
    out = Path(out)
    if options.compile and out.suffix != ".pt2":
        raise UserError(f"out: expected NAME.pt2 to compile, but got {out}")
    if options.opset != WholeOptions.opset and out.suffix != ".onnx":
        raise UserError(f"out: expected NAME.onnx to set the opset, but got {out}")
    if out.suffix == ".onnx":
        require_extra("export to .onnx", "onnx", "onnx", "onnxscript")
    refuse_overwrite(out, [run := local(run)])
    recipe, model, data = load_run(run)
    whole = task_of(recipe).whole(model, data, resize=options.resize)
    description = {
        **describe(recipe, data),
        "normalization": "inside" if options.normalize else _NORMALIZATION,
        "interpolation": recipe.interpolation.value,
        "options": dataclasses.asdict(options),
        "outputs": list(whole.outputs),
        "versions": versions(),
        "requires": [] if options.standard or out.suffix == ".onnx" else ["import deformnet"],
    }
    with _quiet():
        program = _program(whole, options)
        if out.suffix == ".onnx":
            content = _to_onnx(program, options, description)
        else:
            content = _to_pt2(program, options, description)
    write_file(out, content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides torchvision's warnings about PyTorch, the exporter's about its own graphs, and the
    tracebacks of damaged programs, which PyTorch logs before it raises another error."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Normalized(nn.Module):
    """A network that first normalizes its input."""

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Any:
        return self.module((images.float() / 255 - self.mean) / self.std)


class _Plain(nn.Module):
    """A network that returns tensors or tuples of tensors, rather than named tuples."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        output = self.module(images)
        return output if isinstance(output, Tensor) else tuple(output)


def _program(whole: Whole, options: WholeOptions) -> ExportedProgram:
    module = _Plain(_Normalized(whole.module) if options.normalize else whole.module).eval()
    height, width = options.size or _EXAMPLE
    # torch.export would specialize on a batch size of one.
    images = torch.zeros(1 if whole.one_image else 2, 3, height, width)
    images = images.to(torch.uint8) if options.normalize else images
    dynamic = {} if whole.one_image else {0: Dim("batch")}
    if options.size is None:
        dynamic |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes=(dynamic,))


def _to_onnx(
    program: ExportedProgram, options: WholeOptions, description: Mapping[str, Any]
) -> bytes:
    import onnx
    from onnxscript import optimizer

    table: dict[Any, Callable[..., Any]] = {
        **decompositions(onnx=not options.standard),
        torch.ops.aten.sort.stable: _stable_sort,
    }
    program = program.run_decompositions(table)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=options.opset,
        input_names=["images"],
        output_names=description["outputs"],
        verbose=False,
        optimize=False,
    )
    assert exported is not None
    # If the exporter cannot convert to this opset, it only warns and keeps its own.
    if exported.model.opset_imports[""] != options.opset:
        raise UserError(
            "expected opset to be supported by the installed onnxscript, but got "
            f"{options.opset}; lower it, or upgrade torch and onnxscript"
        )
    # The exporter would run two iterations, which take twice as long for 3% fewer nodes.
    optimizer.optimize(exported.model, num_iterations=1)
    proto = exported.model_proto
    entries = {  # the last five are for other programs
        _KEY: description,
        "classes": description["data"]["classes"],
        "size": options.size or "any",
        "interpolation": description["interpolation"],
        "recipe": description["recipe"],
        "normalization": description["normalization"],
    }
    texts = {key: json.dumps(it) for key, it in entries.items()}
    onnx.helper.set_model_props(proto, texts | {_DIGEST: "0" * 64})
    onnx.checker.check_model(proto)
    return _tensors.sealed(proto.SerializeToString(), _DIGEST_KEY)


def _stable_sort(
    values: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """Stable in ONNX, whose TopK puts the lower index first, but not in PyTorch."""
    return values.topk(values.shape[dim], dim, descending)


def _to_pt2(
    program: ExportedProgram, options: WholeOptions, description: Mapping[str, Any]
) -> bytes:
    if options.standard:
        program = program.run_decompositions(decompositions())
    buffer, text = io.BytesIO(), json.dumps(description)
    if options.compile:
        from torch._inductor import aoti_compile_and_package

        configs = {"aot_inductor.metadata": {_KEY: text}}
        aoti_compile_and_package(program, package_path=buffer, inductor_configs=configs)
    else:
        from torch._export.serde.serialize import SerializeError

        try:
            torch.export.save(program, buffer, extra_files={_KEY: text})
        except SerializeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                "expected a network whose dynamic sizes PyTorch can save in a .pt2 file, but got: "
                f"{reason}; set --size HEIGHT WIDTH, or export to NAME.onnx"
            ) from error
    return buffer.getvalue()


class _Loaded(nn.Module):
    """A network loaded from a file. It takes normalized images, like the networks of runs.

    Args:
        path: the file.
        run: runs the file on images in its own format and returns its outputs.
        options: the options that it was exported with.
    """

    def __init__(
        self, path: Path, run: Callable[[Tensor], tuple[Tensor, ...]], options: WholeOptions
    ) -> None:
        super().__init__()
        self._path, self._run, self._options = path, run, options

    def forward(self, images: Tensor) -> Any:
        size, expected = (images.shape[2], images.shape[3]), self._options.size
        if expected is not None and size != expected:
            raise UserError(
                f"{self._path}: expected an image that is {expected[0]} x {expected[1]} pixels "
                f"after resizing, but got {size[0]} x {size[1]}; to accept images of any size, "
                "export without a size"
            )
        if self._options.normalize:
            # Pixels were integers before normalization.
            mean, std = (images.new_tensor(it)[:, None, None] for it in _NORMALIZATION.values())
            images = ((images * std + mean) * 255).round().to(torch.uint8)
        outputs = self._run(images.contiguous())
        first, *others = outputs
        return outputs if others else first


def load_whole(
    path: Path, options: TaskOptions, device: torch.device | str | None = None
) -> Predictor:
    """The predictor for a network that `export_whole` wrote; it runs on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if the file is damaged or was not written by deformnet, or `device` is not the
            CPU.
        MissingExtraError: for NAME.onnx, if onnxruntime is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if torch.device(device or "cpu").type != "cpu":
        raise UserError(
            f"expected device to be cpu for {path.name}, but got {device}; predict with the run "
            "folder, or run the file with the runtime of your device"
        )
    run, text = (_from_onnx if path.suffix == ".onnx" else _from_pt2)(path)
    try:
        description = parse_json(text or "")
        fields = description["options"]
        size = None if fields["size"] is None else tuple(fields["size"])
        how = WholeOptions(**{**fields, "size": size})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a network that deformnet exported, but its description is missing "
            "or damaged"
        ) from error
    recipe, data = recipe_and_data(description, path)
    return task_of(recipe, options).whole_predictor(_Loaded(path, run, how), data, "cpu")


_Loader = tuple[Callable[[Tensor], tuple[Tensor, ...]], str | None]


def _from_onnx(path: Path) -> _Loader:
    require_extra(f"{path.name}", "onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    content = read_file(path)
    with _readable(path, "an ONNX file"):
        if _tensors.is_sealed(content, _DIGEST_KEY) is False:
            raise UserError("its content does not match its SHA-256")
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {"images": images.numpy()})
        return tuple(torch.from_numpy(output) for output in outputs)

    return run, session.get_modelmeta().custom_metadata_map.get(_KEY)


def _from_pt2(path: Path) -> _Loader:
    with naming(path), path.open("rb") as file, _readable(path, "a .pt2 file"):
        with _tensors.intact_archive(file) as archive:
            compiled = any("aotinductor" in name for name in archive.namelist())
        if compiled:
            from torch._inductor import aoti_load_package

            package = aoti_load_package(str(path))
            module, text = package, package.get_metadata().get(_KEY)
        else:
            extra = {_KEY: ""}
            with _quiet():
                module = torch.export.load(path, extra_files=extra).module()
            text = extra[_KEY]

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = module(images)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return run, text


@contextmanager
def _readable(path: Path, expected: str) -> Iterator[None]:
    """Raises `UserError` for any error that the content of a file causes: PyTorch and onnxruntime
    raise many types."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):  # without the file name
            _tensors.require_of_content(error)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path}: expected {expected}, but got a damaged or another file ({reason:.200})"
        ) from error
