"""The images of an evaluation, shared among processes and loaded by workers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from deformnet._errors import UserError
from deformnet.data.workers import loaded
from deformnet.models.network import Network
from deformnet.tasks.base import Processes

_MOST_PIXELS = 10**9
_S = TypeVar("_S")
_S_co = TypeVar("_S_co", covariant=True)
_T = TypeVar("_T")


class Samples(Protocol[_S_co]):
    """A data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _S_co: ...


class _Numbered(Generic[_S_co]):
    def __init__(self, samples: Samples[_S_co]) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[int, _S_co]:
        return index, self.samples[index]


def shared(
    samples: Samples[_S_co], processes: Processes, title: str = "evaluation"
) -> Iterator[tuple[int, _S_co]]:
    """The samples of this process, each with its index.

    Ends early if the processes are asked to stop; `Processes.gather` then raises `StopRequested`.
    """
    keys = range(processes.rank, len(samples), processes.count)
    source = loaded(
        _Numbered(samples),
        keys,
        workers=processes.workers,
        what="image {}".format,
        pin=processes.device.type == "cuda",
        timeout=processes.timeout,
        stopping=processes.stopping,
    )
    hidden = not processes.progress or processes.rank > 0
    bar = tqdm(source, desc=title, total=len(keys), disable=True if hidden else None)
    with closing(source):
        yield from bar


def predictions(
    samples: Samples[_S], predict: Callable[[int, _S], _T], processes: Processes
) -> list[_T]:
    """The predictions for all samples, in order, computed by all processes. `predict` takes the
    index of a sample and the sample."""
    own = [(index, predict(index, sample)) for index, sample in shared(samples, processes)]
    by_index = dict(pair for part in processes.gather(own) for pair in part)
    return [by_index[index] for index in range(len(samples))]


def stack(images: Sequence[Tensor], padding: float = 0) -> Tensor:
    """Stacks images [..., h, w] of different sizes, padded on the right and at the bottom."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    if len(images) * height * width > _MOST_PIXELS:
        raise UserError(
            f"expected a batch of at most {_MOST_PIXELS // 10**6} million pixels, but got "
            f"{len(images)} images, {width}x{height} with their padding; use a smaller max_side or "
            "batch, or a crop"
        )
    if all(image.shape[-2:] == (height, width) for image in images):
        return torch.stack(list(images))  # `F.pad` would copy them first
    return torch.stack([pad(image, height, width, padding) for image in images])


def alone(model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """A batch as a network with a frozen backbone takes it: each image without its padding.

    The frozen backbone sees an image as in evaluation, whatever is in the batch with it, so its
    `maps` can be kept. Those are returned, padded with zeros, if the images differ in size.

    Args:
        images: [N, 3, H, W] with padding, or `maps`, which are returned as they are.
        sizes: height and width of each image without its padding.
    """
    backbone = cast(Network, model).backbone
    whole = (images.shape[2], images.shape[3])
    if set(sizes) == {whole} or images.shape[1] != 3 or not backbone.frozen:
        return images
    groups = {size: [i for i, own in enumerate(sizes) if own == size] for size in sizes}
    with torch.no_grad():
        maps = {
            size: backbone.maps(images[of_size, :, : size[0], : size[1]])
            for size, of_size in groups.items()
        }
    rows, columns = (-(-side // backbone.stride) for side in whole)
    first = next(iter(maps.values()))
    joined = first.new_zeros(len(images), first.shape[1], rows, columns)
    for size, of_size in groups.items():
        joined[of_size, :, : maps[size].shape[2], : maps[size].shape[3]] = maps[size]
    return joined


def pad(images: Tensor, height: int, width: int, padding: float = 0) -> Tensor:
    """Pads images [..., h, w] on the right and at the bottom."""
    h, w = images.shape[-2:]
    return F.pad(images, (0, width - w, 0, height - h), value=padding)
