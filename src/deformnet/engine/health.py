"""Offsets that run away, detected while a model trains."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from deformnet.analysis import LayerHealth, OffsetObserver
from deformnet.ops._arguments import positive

_REMEDY = "a lower offset_lr_scale, gradient clipping or a longer warm-up may help"


class OffsetHealth:
    """Measures the offsets of each deformable layer, and warns when they run away.

    For any training loop and any model that holds deformnet's or torchvision's `DeformConv2d`, or
    deformable RoI pooling. `LayerHealth.runaway` defines running away. Each layer is warned of
    once; iterations in between cost nothing.

        >>> health = OffsetHealth(model, every=10)
        >>> for iteration, (images, labels) in enumerate(loader, start=1):
        ...     optimizer.zero_grad()
        ...     with health.watch(iteration):
        ...         cross_entropy(model(images), labels).backward()
        ...     optimizer.step()

    Args:
        model: holds deformable layers.
        every: iterations between measurements.
        warn: whether to warn; False in all processes but one.
    Attributes:
        layers: the last measurements; empty after an iteration without.
        messages: the warning for each layer that has run away, by its name.
    Raises:
        ValueError: if the model has no deformable layer, or `every` is below 1.
    """

    def __init__(self, model: nn.Module, every: int = 10, *, warn: bool = True) -> None:
        self.every, self.warn = positive("every", every), warn
        self.layers: list[LayerHealth] = []
        self.messages: dict[str, str] = {}
        self._observer = OffsetObserver(model)

    @contextmanager
    def watch(self, iteration: int) -> Iterator[None]:
        """Measures the passes in the block, if the iteration (counted from 1) is due."""
        self.layers = []
        if iteration % self.every != 0:
            yield
            return
        with self._observer:
            yield
        self.layers = self._observer.health()
        for layer in self.layers:
            reason = layer.runaway()
            if reason is not None and layer.layer not in self.messages:
                self.messages[layer.layer] = (
                    f"the offsets of {layer.layer} run away in iteration {iteration}: "
                    f"{reason}; {_REMEDY}"
                )
                if self.warn:
                    warnings.warn(self.messages[layer.layer], stacklevel=1)

    def runaway(self) -> bool:
        """Whether the last measurements show a layer whose offsets run away."""
        return any(layer.runaway() is not None for layer in self.layers)

    def scalars(self) -> dict[str, float]:
        """The last measurements by name, for a log: `offsets/LAYER/mean_shift` and others."""
        return {
            f"offsets/{layer.layer}/{name}": value
            for layer in self.layers
            for name in ("mean_shift", "max_shift", "outside", "gradient_ratio")
            if (value := getattr(layer, name)) is not None
        }
