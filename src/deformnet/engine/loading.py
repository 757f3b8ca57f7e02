"""From data sets to the loaders of training and scoring, shared among processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Sampler

from deformnet.recipes import Recipe
from deformnet.engine.sampling import Draws, DrawSampler, Images, ignore_interrupts


class TrainingData(pl.LightningDataModule):
    """The draws of a training run, from wherever its checkpoint left off.

    Args:
        recipe: batch, length and seed of the run.
        images: with their transforms.
        collate: makes a part of a batch of samples.
        workers: processes that load images; 0 loads in this one.
        parts: into how many parts each process divides what it has of a batch.
        groups: a number for each image; images of different numbers share a batch only where an
            epoch ends. None puts any images together.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Images,
        collate: Callable[[Sequence[Any]], Any],
        workers: int,
        parts: int,
        groups: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.images = images
        self.collate = collate
        self.workers = workers
        self.parts = parts
        self.groups = groups

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        sampler = DrawSampler(
            self.trainer.global_step,
            self.recipe.iterations,
            self.recipe.batch,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return DataLoader(
            Draws(self.images, self.recipe.seed, self.recipe.batch, self.groups),
            batch_sampler=sampler,
            collate_fn=_Parts(self.collate, self.parts),
            num_workers=self.workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


@dataclass(frozen=True)
class _Parts:
    """Makes the parts of a process's share of a batch."""

    collate: Callable[[Sequence[Any]], Any]
    parts: int

    def __call__(self, samples: Sequence[Any]) -> list[Any]:
        size = len(samples) // self.parts
        starts = range(0, len(samples), size)
        return [self.collate(samples[start : start + size]) for start in starts]


class ScoringData(pl.LightningDataModule):
    """Images one by one, each once, shared among processes.

    Args:
        images: what the module's validation step takes.
        workers: processes that load images; 0 loads in this one.
    """

    def __init__(self, images: Images, workers: int) -> None:
        super().__init__()
        self.images = images
        self.workers = workers

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        share = range(self.trainer.global_rank, len(self.images), self.trainer.world_size)
        return DataLoader(
            self.images,  # pyright: ignore[reportArgumentType] (a map-style data set is enough)
            sampler=_InOrder(share),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


class _InOrder(Sampler[int]):
    def __init__(self, indices: range) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
