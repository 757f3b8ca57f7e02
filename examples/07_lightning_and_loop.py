"""
Your own training loop
======================

Deformable layers need no special training loop, neither in plain PyTorch nor in Lightning. But
their offsets can run away; :class:`~deformnet.analysis.OffsetObserver` detects this.
"""

# %%
# A network and a task
# --------------------
# Does a noisy image show a square or a disc? The last two convolutions of a small network are
# deformable.

import logging
import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from deformnet import deform_, parameter_groups


def batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 32, 32] and whether they show a disc."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    center = torch.randint(9, 23, (count, 2, 1, 1), generator=generator)
    dy, dx = (y - center[:, 0]).abs(), (x - center[:, 1]).abs()
    square, disc = torch.maximum(dy, dx) < 7, dy**2 + dx**2 < 64
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.where(labels[:, None, None] == 1, disc, square).float()
    return (images + 0.3 * torch.randn(images.shape, generator=generator))[:, None], labels


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 2), (16, 32, 1), (32, 32, 1)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    deform_(model, "3", "6")
    return model


# %%
# Plain PyTorch
# -------------
# The observer records the offsets of the iterations that it wraps. ``health()`` reports for each
# layer the mean and maximum shift in pixels, the fraction of samples outside the map, and the
# gradient norms of the offset convolution and of the layer itself.

from deformnet.analysis import OffsetObserver

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
model = network()
optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05, offset_lr_scale=0.1), momentum=0.9)
observer = OffsetObserver(model)
losses, shifts = [], []
for _ in range(120):
    images, labels = batch(16, generator)
    with observer:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    losses.append(loss.item())
    shifts.append([layer.mean_shift for layer in observer.health()])
for layer in observer.health():
    print(f"layer {layer.layer}: mean shift {layer.mean_shift:.2f}, maximum {layer.max_shift:.2f}")
    without = layer.outside_without_offsets
    print(f"    outside the map {layer.outside:.1%}, without offsets {without:.1%}")

import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
left.plot(losses, color="#0072b2")
left.set(xlabel="iteration", ylabel="loss")
for values, name, color in zip(
    zip(*shifts, strict=True), ("layer 3", "layer 6"), ("#d55e00", "#009e73"), strict=True
):
    right.plot(values, label=name, color=color)
right.set(xlabel="iteration", ylabel="mean shift (pixels of its map)")
right.legend(frameon=False)
plt.show()

# %%
# Lightning
# ---------
# The same observer in a LightningModule.

import lightning.pytorch as pl


class Task(pl.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.model = network()
        self.observer = OffsetObserver(self.model)
        self.lr = lr

    def training_step(self, images_and_labels: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = images_and_labels
        with self.observer:
            loss = cross_entropy(self.model(images), labels)
        for layer in self.observer.health():
            self.log(f"shift/{layer.layer}", layer.mean_shift)
            self.log(f"outside/{layer.layer}", layer.outside)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameter_groups(self.model, self.lr, offset_lr_scale=0.1), momentum=0.9
        )


def fit(lr: float) -> pl.Trainer:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    trainer = pl.Trainer(
        max_steps=60,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [batch(16, generator) for _ in range(60)]
    trainer.fit(Task(lr), DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]
    return trainer


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
for lr in (0.05, 2.0):
    print(f"learning rate {lr}:")
    for name, value in fit(lr).callback_metrics.items():
        print(f"    {name:12} {float(value):.3f}")

# %%
# If the learning rate is far too high, sampling locations leave the map. ``deformnet train`` then
# prints a warning that names the layer; with ``--stop-on-runaway``, it stops the run.
