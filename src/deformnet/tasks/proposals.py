"""Proposals on disk: those of a trained network, for others to train and to be scored on.

The paper's ablation on VOC trains all detectors on the same proposals of a separately trained
region proposal network, so that only what follows it differs.

A file is one safetensors: `boxes` float32 [M, 4] in pixels of the images as stored, `scores`
float32 [M] and `starts` int64 [I + 1]; image i, by the i-th of the names in its metadata, has the
boxes from starts[i] to starts[i + 1], best first.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deformnet.models.detection.detector import Proposals
from deformnet._files import replacing


class StoredProposals:
    """The proposals of one or more files, by image.

    Args:
        files: as `write_proposals` writes them.
    Attributes:
        digest: of all boxes and names.
    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if one is damaged or no file of proposals, or an image is in two.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        digests = []
        self.files = tuple(files)
        self._boxes: list[Tensor] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, path in enumerate(files):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file of proposals")
            try:
                with safe_open(path, framework="pt") as file:
                    boxes, starts = file.get_tensor("boxes"), file.get_tensor("starts")
                    names = json.loads(file.metadata()["names"])
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: damaged, or not a file of proposals") from error
            if (
                boxes.dtype != torch.float32
                or boxes.ndim != 2
                or boxes.shape[1] != 4
                or starts.dtype != torch.int64
                or starts.shape != (len(names) + 1,)
                or int(starts[0]) != 0
                or int(starts[-1]) != len(boxes)
                or bool((starts.diff() < 0).any())
                or not boxes.isfinite().all()
            ):
                raise ValueError(f"{path}: damaged, its boxes do not fit its images")
            places = starts.tolist()
            self._boxes.append(boxes)
            for name, start, end in zip(names, places[:-1], places[1:], strict=True):
                if name in self._places:
                    other = files[self._places[name][0]]
                    raise ValueError(f"{path}: image {name} has proposals in {other} already")
                self._places[name] = (number, start, end)
            digest = hashlib.sha256(json.dumps([names, places]).encode())
            digest.update(boxes.numpy().tobytes())
            digests.append(digest.hexdigest())
        # The order of the files does not matter.
        self.digest = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()

    def __getitem__(self, name: str) -> Tensor:
        """Boxes [P, 4] of an image, in its pixels.

        Raises:
            ValueError: if the files have no such image.
        """
        if name not in self._places:
            raise ValueError(f"{self.files[0]}: has no proposals for image {name}")
        number, start, end = self._places[name]
        # A copy: with a part of a tensor, a loader process would send all of it.
        return self._boxes[number][start:end].clone()


def write_proposals(path: Path, names: Sequence[str], found: Sequence[Proposals]) -> None:
    """Writes the proposals of images into a file.

    Args:
        names: of the images.
        found: their proposals, in pixels of the images as stored.
    Raises:
        OSError: if the file cannot be written.
    """
    starts = torch.tensor([0, *(len(one.boxes) for one in found)]).cumsum(0)
    content = save(
        {
            "boxes": torch.cat([one.boxes for one in found]).cpu(),
            "scores": torch.cat([one.scores for one in found]).cpu(),
            "starts": starts,
        },
        metadata={"names": json.dumps(list(names))},
    )
    with replacing(path) as file:
        file.write(content)
