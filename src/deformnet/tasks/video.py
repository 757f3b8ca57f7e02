"""Video frames, decoded by torchcodec, PyAV or OpenCV, whichever is installed."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deformnet._errors import UserError
from deformnet.data.files import MAX_PIXELS, size_text

VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}

_Frames = Iterator[Tensor]


def require_reader() -> None:
    """Raises UserError if no video reader is installed."""
    _reader()


def read_frames(path: Path) -> _Frames:
    """Iterates over the upright frames of a video, uint8 [3, H, W].

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if no video reader is installed, or the file is not a readable video.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    module, frames = _reader()
    try:
        empty = True
        for frame in frames(module, path):
            empty = False
            if frame[0].numel() > MAX_PIXELS:
                raise UserError(
                    f"expected frames of at most {MAX_PIXELS} pixels, but got "
                    f"{size_text(*frame.shape[1:])}"
                )
            yield frame
    except (RuntimeError, ValueError, OSError) as error:  # depends on the reader
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{path}: not a readable video ({reason[0]})") from error
    if empty:
        raise UserError(f"{path}: not a readable video (it has no frames)")


def _torchcodec(module: Any, path: Path) -> _Frames:
    yield from module.VideoDecoder(str(path), dimension_order="NCHW")


def _pyav(module: Any, path: Path) -> _Frames:
    with module.open(str(path)) as container:
        for frame in container.decode(video=0):
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0) // 90)
            yield _tensor(pixels)


def _opencv(module: Any, path: Path) -> _Frames:
    capture = module.VideoCapture(str(path))
    try:
        while True:
            there, pixels = capture.read()
            if not there:
                return
            yield _tensor(pixels[..., ::-1])  # BGR
    finally:
        capture.release()


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


_READERS: dict[str, Callable[[Any, Path], _Frames]] = {
    "torchcodec.decoders": _torchcodec,
    "av": _pyav,
    "cv2": _opencv,
}


def _reader() -> tuple[Any, Callable[[Any, Path], _Frames]]:
    """The first reader that can be imported."""
    for name, frames in _READERS.items():
        try:
            return importlib.import_module(name), frames
        except (ImportError, RuntimeError, OSError):  # torchcodec without FFmpeg's libraries
            continue
    raise UserError(
        "expected a video reader, but none of torchcodec, PyAV and OpenCV is installed; "
        "run `pip install av`"
    )
