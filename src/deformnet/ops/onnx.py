"""Helpers for the ONNX export of all operators."""

import sys

import torch

from deformnet.ops.backends import constant


# torch.compile and strict torch.export would assume that PyTorch's function returns False.
@constant
def in_onnx_export() -> bool:
    """Whether `torch.onnx.export` is running."""
    return torch.onnx.is_in_onnx_export()


def refuse_legacy_export() -> None:
    """Refuse `torch.onnx.export(dynamo=False)`, which does not support our operators.

    Call this while a model is traced with `torch.jit.trace`, which that exporter uses.

    Raises:
        ValueError: if `torch.onnx.export` is running.
    """
    if torch.onnx.is_in_onnx_export():
        raise ValueError("expected torch.onnx.export with dynamo=True, but got dynamo=False")


@constant
def require_opset(least: int, what: str) -> None:
    """Refuse an export to an older opset; call this while the exporter traces.

    The exporter has no public way to ask for the opset, and would write the newer operator into a
    file of the older opset, which no runtime can load.

    Args:
        least: first opset that has the operator.
        what: name of the operator.

    Raises:
        ValueError: if `torch.onnx.export` was called with an older `opset_version`.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.onnx."):
            opset = frame.f_locals.get("opset_version")
            if isinstance(opset, int):
                break
        frame = frame.f_back
    else:
        return
    if opset < least:
        raise ValueError(
            f"expected opset_version to be at least {least}, the first with {what}, but got "
            f"{opset}; pass opset_version={least}, or export a program with standard operators: "
            "torch.export.export(model, args).run_decompositions(deformnet.ops.decompositions())"
        )
