"""Stored proposals: those of a trained network, for others to train and be evaluated on.

In the paper's ablation on VOC all detectors train on the same proposals of a separate region
proposal network, so that they differ in nothing else.

A file is one safetensors: `boxes` float32 [M, 4] in pixels of the images as stored, `scores`
float32 [M] and `starts` int64 [I + 1]. The i-th image of the names in its metadata has the boxes
from starts[i] to starts[i + 1], best first.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import parse_json, require_own, write_file
from deformnet.models import _tensors
from deformnet.models.detection.detector import Proposals


class StoredProposals:
    """The proposals of one or more files, by image.

    Args:
        files: as `write_proposals` writes them.
    Attributes:
        digest: of all boxes and names.
    Raises:
        FileNotFoundError: if a file does not exist.
        UserError: if a file is damaged or holds no proposals, or an image is in two files.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        digests = []
        self.files = tuple(files)
        self._boxes: list[Tensor] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, path in enumerate(files):
            boxes, names, starts = _read(path)
            self._boxes.append(boxes)
            for name, start, end in zip(names, starts[:-1], starts[1:], strict=True):
                if name in self._places:
                    other = files[self._places[name][0]]
                    raise UserError(
                        f"{path}: expected images without proposals so far, but {other} has those "
                        f"of image {name}"
                    )
                self._places[name] = (number, start, end)
            digest = hashlib.sha256(json.dumps([names, starts]).encode())
            digest.update(boxes.numpy().tobytes())
            digests.append(digest.hexdigest())
        # The order of the files does not matter.
        self.digest = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()

    def require(self, name: str) -> None:
        """Raises UserError if the files have no proposals for an image."""
        if name not in self._places:
            raise UserError(f"{self.files[0]}: expected proposals for image {name}, but got none")

    def __getitem__(self, name: str) -> Tensor:
        """Boxes [P, 4] of an image, in its pixels; errors as of `require`."""
        self.require(name)
        number, start, end = self._places[name]
        # A copy: with a part of a tensor, a loader process would send all of it.
        return self._boxes[number][start:end].clone()


def _read(path: Path) -> tuple[Tensor, list[str], list[int]]:
    """Boxes, names and starts of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of proposals")
    tensors, metadata = _tensors.read_safetensors(path)
    try:
        boxes, starts = tensors["boxes"], tensors["starts"]
        names = parse_json(metadata["names"])
    except (KeyError, UserError) as error:
        raise UserError(f"{path}: damaged, or not a file of proposals") from error
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or boxes.dtype != torch.float32
        or boxes.ndim != 2
        or boxes.shape[1] != 4
        or starts.dtype != torch.int64
        or starts.shape != (len(names) + 1,)
        or int(starts[0]) != 0
        or int(starts[-1]) != len(boxes)
        or bool((starts.diff() < 0).any())
        or not boxes.isfinite().all()
    ):
        raise UserError(f"{path}: damaged, its boxes do not match its images")
    return boxes, names, starts.tolist()


def require_proposals(path: Path) -> None:
    """Refuses to replace a file that does not contain proposals.

    Raises:
        UserError: if `path` is such a file; it is not changed.
    """
    require_own(path, "a file of proposals", _is_proposals)


def _is_proposals(path: Path) -> bool:
    try:
        _read(path)
    except UserError:
        return False
    return True


def write_proposals(path: Path, names: Sequence[str], proposals: Sequence[Proposals]) -> None:
    """Writes the proposals of images, in pixels of the images as stored, into a file."""
    starts = torch.tensor([0, *(len(image.boxes) for image in proposals)]).cumsum(0)
    boxes, scores = (torch.cat(parts).cpu() for parts in zip(*proposals, strict=True))
    tensors = {"boxes": boxes, "scores": scores, "starts": starts}
    write_file(path, _tensors.pack(tensors, {"names": json.dumps(list(names))}))
