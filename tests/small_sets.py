"""Writers of small images and label maps, and a check of error messages."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformnet.data.voc_files import color_map


def save_image(path: Path, height: int = 12, width: int = 16, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_labels(path: Path, labels: np.ndarray | int, mode: str = "P") -> None:
    """A label map; a number stands for 12 x 16 pixels of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full((12, 16), labels) if isinstance(labels, int) else labels
    image = Image.fromarray(labels.astype(np.uint8))
    if mode == "P":
        image.putpalette(color_map().tobytes())
    image.save(path)


def save_city(root: Path, split: str, name: str, label: int) -> None:
    """An image of Cityscapes, such as aachen_000000_000001, with one id."""
    place = f"{split}/{name.split('_')[0]}/{name}"
    save_image(root / f"leftImg8bit/{place}_leftImg8bit.png")
    save_labels(root / f"gtFine/{place}_gtFine_labelIds.png", label, mode="L")


def write_list(path: Path, names: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


@contextmanager
def one_line(
    error: type[Exception] | tuple[type[Exception], ...], *parts: object
) -> Iterator[None]:
    """The block raises `error` with a message of one line that contains all `parts`."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
