"""A small data set and a quick recipe for runs that end in seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import small, write_images

from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.recipes import DeepLabRecipe


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven training and three validation images of 40 x 48 pixels, without void pixels."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, Shapes(train=7, val=3, height=40, width=48))
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven training images of three sizes, two of them alike, and five to validate on."""
    root = tmp_path_factory.mktemp("data") / "images"
    write_images(root)
    return root


@pytest.fixture(scope="session")
def quick() -> DeepLabRecipe:
    """A tiny deformable ResNet on images of 32 pixels."""
    return small(DeepLabRecipe, norm="trained", batch=2, iterations=6, warmup=2, lr=0.01)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: quick on images this small, and as in the programs that the tests start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
