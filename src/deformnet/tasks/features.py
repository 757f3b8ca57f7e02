"""Features of a frozen backbone, which are computed once and kept on disk.

Each file contains the `maps` of one image at one size, in half precision. Its name is the SHA-256
of the pixels that the backbone sees; its folder is named by that of the backbone. Other weights or
images therefore never match, images in several data sets are stored once, and an interrupted run
continues. Checksums are verified on every read. Files are written atomically, so any number of
processes can share a folder.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import read_file, write_file
from deformnet.models._tensors import pack, unpack
from deformnet.models.backbones import Backbone
from deformnet.tasks.base import Features, Processes, TrainingSet
from deformnet.tasks.loading import shared
from deformnet.tasks.predictor import ready

_log = logging.getLogger("deformnet")
_NAME = "maps"


class FeatureCache:
    """The features of a frozen backbone of output stride 8 or 16.

    Args:
        folder: the folder of the features of any backbones.
        backbone: the backbone, with its final weights; moved to `device`.
        device: where missing features are computed.
    Attributes:
        computed: number of maps computed so far because they were missing or damaged.
    """

    def __init__(self, folder: str | Path, backbone: Backbone, device: torch.device) -> None:
        folder = Path(folder)
        self._folder, self._backbone, self._device = folder, backbone, device
        ready(backbone, device)
        self._own = folder / _digest_of(backbone)
        self.computed = 0

    def recall(self, images: Tensor) -> Tensor:
        """The backbone's `maps` of normalized images [N, 3, H, W], on their device.

        Missing and damaged ones are computed and written.

        Raises:
            UserError: if they exceed the range of half precision.
            OSError: if a file cannot be written.
        """
        maps = [self._of_key(_key(image), image) for image in images]
        return torch.stack(maps).to(images.device)

    def filled(self, images: TrainingSet, flip: bool, processes: Processes) -> Features:
        """The features of all images, with those of their horizontal flips if `flip`.

        All processes call this method and compute their share.

        Raises:
            UserError, OSError: see `recall`; also if an image cannot be read.
        """
        if processes.rank == 0:
            what = f"{len(images)} images" + (" and their horizontal flips" if flip else "")
            others = self._folder.is_dir() and not self._own.is_dir()
            anew = " (none are of this backbone with these weights)" if others else ""
            _log.info(f"features of the frozen backbone, of {what}: {self._folder}{anew}")
        own: dict[int, tuple[bytes, tuple[int, int]]] = {}
        for index, image in shared(_Inputs(images), processes, "caching features"):
            seen = [image, image.flip(-1)] if flip else [image]
            keys = [_key(one) for one in seen]
            for key, one in zip(keys, seen, strict=True):
                self._of_key(key, one)
            own[index] = b"".join(keys), (image.shape[1], image.shape[2])
        parts = processes.gather((own, self.computed))
        if processes.rank == 0:
            computed, every = sum(count for _, count in parts), len(images) * (1 + flip)
            _log.info(f"features: {computed} computed, {every - computed} found")
        found = {index: entry for part, _ in parts for index, entry in part.items()}
        keys, sizes = zip(*(found[index] for index in range(len(images))), strict=True)
        return _Stored(self._own, keys, sizes)

    def _of_key(self, key: bytes, image: Tensor) -> Tensor:
        """The maps of an image [3, h, w], float16 [C, H, W] on the CPU."""
        path = _path(self._own, key)
        try:
            if (maps := _read(path)) is not None:
                return maps
        except UserError as error:
            _log.warning(f"{error}; recomputed")
        batch = image[None].to(self._device, memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            maps = self._backbone.maps(batch)[0].half().cpu().contiguous()
        if not maps.isfinite().all():
            raise UserError(
                f"{path}: expected features of at most 65504, the range of half precision, but "
                f"those of {self._backbone.name} exceed it; train without feature_cache"
            )
        write_file(path, pack({_NAME: maps}, {}), durable=False)  # a torn one fails its checksum
        self.computed += 1
        return maps


class _Stored(Features):
    """Features on disk."""

    def __init__(
        self, folder: Path, keys: Sequence[bytes], sizes: Sequence[tuple[int, int]]
    ) -> None:
        self._folder = folder
        # In arrays, which forked workers share.
        self._keys = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)
        self._sizes = np.array(sizes, dtype=np.int32)

    def size(self, index: int) -> tuple[int, int]:
        height, width = self._sizes[index].tolist()
        return height, width

    def read(self, index: int, *, flipped: bool) -> Tensor:
        key = self._keys[index].tobytes()[32 * flipped :][:32]
        path = _path(self._folder, key)
        try:
            maps = _read(path)
        except UserError as error:
            raise UserError(f"{error}; run the same command to recompute it") from error
        if maps is None:
            raise UserError(
                f"{path}: expected features, but the file was removed during training; run the "
                "same command to recompute it"
            )
        return maps


class _Inputs:
    def __init__(self, images: TrainingSet) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images.input(index)


def _key(image: Tensor) -> bytes:
    digest = hashlib.sha256(str(list(image.shape)).encode())
    digest.update(image.cpu().contiguous().numpy().data)
    return digest.digest()


def _path(folder: Path, key: bytes) -> Path:
    return folder / f"{key.hex()}.safetensors"


def _read(path: Path) -> Tensor | None:
    """The maps in a file; None if there is none, UserError if it is damaged."""
    try:
        return unpack(read_file(path), path)[_NAME]
    except FileNotFoundError:
        return None
    except KeyError:
        raise UserError(f"{path}: expected features, but got other tensors") from None


def _digest_of(backbone: Backbone) -> str:
    """The SHA-256 of what determines the features: architecture and weights."""
    modules = backbone.frozen_modules()
    digest = hashlib.sha256(f"{backbone.name} {backbone.map_channels} {modules}".encode())
    for name, value in modules.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()
