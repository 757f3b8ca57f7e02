"""DeepLab for Lightning: the training step, the scoring of images, and the data of both."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler

from deformnet.data.base import IGNORE, SegmentationDataset
from deformnet.data.transforms import evaluation_transforms
from deformnet.evaluation.segmentation import (
    SegmentationScores,
    confusion_matrix,
    segmentation_scores,
)
from deformnet.models.deeplab import DeepLab
from deformnet.nn import parameter_groups
from deformnet.recipes import DeepLabRecipe
from deformnet.runs import DataIdentity, describe
from deformnet.training.sampling import Draws, DrawSampler, ignore_interrupts

ScoreAt = Literal["truth", "network"]
"""The size at which predictions meet the truth: that of the label map on disk, to which the logits
are upsampled; or that at which the network sees the image, to which the label map is resized (the
authors' rule on VOC: mean IoU at 360 pixels)."""


class SegmentationModule(pl.LightningModule):
    """Trains and scores a DeepLab.

    Args:
        recipe: the schedule.
        model: the network of that recipe.
        data: what is written into checkpoints about the training data.
        score_at: see `ScoreAt`.
    Attributes:
        scores: after `Trainer.validate`, over all images and processes.
    """

    def __init__(
        self,
        recipe: DeepLabRecipe,
        model: DeepLab,
        data: DataIdentity,
        *,
        score_at: ScoreAt = "truth",
    ) -> None:
        super().__init__()
        self.recipe = recipe
        # Convolutions run faster on this layout, on CPUs and GPUs alike.
        self.model = model.to(memory_format=torch.channels_last)
        self.data = data
        self.score_at = score_at
        self.confusion = confusion_matrix(len(data.classes))
        self.scores: SegmentationScores | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        logits = self.model(images.contiguous(memory_format=torch.channels_last))
        loss = torch.stack(list(self.model.losses(logits, targets).values())).sum()
        loss = loss * self._share(targets)
        self.log("loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("learning_rate", self.recipe.lr * self.recipe.lr_factor(self.trainer.global_step))
        return loss

    def _share(self, targets: Tensor) -> Tensor | float:
        """This process's weight in the mean over the valid pixels of the whole batch.

        Gradients are averaged over processes, each of which took the mean over its own pixels.
        """
        if self.trainer.world_size == 1:
            return 1.0
        valid = (targets != IGNORE).sum().to(torch.float64)
        total = self.trainer.strategy.reduce(valid.clone(), reduce_op="sum")
        return (valid * self.trainer.world_size / total.clamp(min=1)).to(torch.float32)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(
            self.model,
            self.recipe.lr,
            offset_lr_scale=self.recipe.offset_lr_scale,
            weight_decay=self.recipe.weight_decay,
        )
        optimizer = SGD(groups, lr=self.recipe.lr, momentum=self.recipe.momentum)
        schedule = LambdaLR(optimizer, self.recipe.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["deformnet"] = describe(self.recipe, self.data)

    def on_validation_epoch_start(self) -> None:
        self.confusion.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        image, truth, resized = batch
        logits = self.model(image[None].contiguous(memory_format=torch.channels_last))
        if self.score_at == "truth":
            size = list(truth.shape)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        else:
            truth = resized
        self.confusion.update(logits.argmax(dim=1), truth[None])

    def on_validation_epoch_end(self) -> None:
        self.scores = segmentation_scores(self.confusion.compute())


class TrainingData(pl.LightningDataModule):
    """The draws of a training run, from wherever its checkpoint left off."""

    def __init__(self, recipe: DeepLabRecipe, images: SegmentationDataset, workers: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.images = images
        self.workers = workers

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
            Draws(self.images, self.recipe.seed),
            batch_sampler=sampler,
            collate_fn=pad_to_batch,
            num_workers=self.workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


class ScoringData(pl.LightningDataModule):
    """Images one by one with their label maps at both sizes, each once, shared among processes.

    Args:
        images: without transforms.
    """

    def __init__(self, recipe: DeepLabRecipe, images: SegmentationDataset, workers: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.images = images
        self.workers = workers

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        share = range(self.trainer.global_rank, len(self.images), self.trainer.world_size)
        return DataLoader(
            _ScoredImages(self.recipe, self.images),
            sampler=_InOrder(share),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


class _ScoredImages(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, recipe: DeepLabRecipe, images: SegmentationDataset) -> None:
        self.images = images
        self.transforms = evaluation_transforms(
            short_side=recipe.short_side, max_side=recipe.max_side
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, truth = self.images[index]
        prepared, resized = self.transforms(image, truth)
        return prepared, truth.as_subclass(Tensor).long(), resized


class _InOrder(Sampler[int]):
    def __init__(self, indices: range) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def pad_to_batch(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stacks images of different sizes: smaller ones are extended to the right and below.

    Args:
        samples: normalised images [3, h, w] and masks [h, w].
    Returns:
        [N, 3, H, W] and [N, H, W] of the largest height and width; what was added is the mean
        colour (0) in the images and void in the masks.
    """
    height = max(mask.shape[0] for _, mask in samples)
    width = max(mask.shape[1] for _, mask in samples)
    images = samples[0][0].new_zeros(len(samples), 3, height, width)
    masks = samples[0][1].new_full((len(samples), height, width), IGNORE)
    for n, (image, mask) in enumerate(samples):
        h, w = mask.shape
        images[n, :, :h, :w] = image
        masks[n, :h, :w] = mask
    return images, masks
