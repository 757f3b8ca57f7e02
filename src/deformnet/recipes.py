"""Recipes: which network, which image size and which schedule, in one frozen dataclass.

A recipe holds everything that decides the result of a training run except the data, and nothing
else: how many processes share the work, or how often a checkpoint is written, is not part of it.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:  # the command line reads recipes before anything heavy is needed
    from deformnet.models.deeplab import DeepLab


@dataclass(frozen=True, kw_only=True)
class DeepLabRecipe:
    """DeepLab on a ResNet, plain or deformable (Dai et al. 2017, section 2.3).

    The defaults train from random weights on one machine; `voc2012` and `cityscapes` give the
    paper's settings for fine-tuning.
    """

    depth: Literal[18, 34, 50, 101] = 50
    """Layers of the ResNet."""
    deform_layers: Literal[0, 1, 2, 3, 6] = 3
    """How many 3x3 convolutions, counted from the end, are deformable; 0 is the plain network."""
    dilation: int = 2
    """Dilation of conv5, whose stride is 1."""
    offset_groups: int = 1
    """Groups of channels that share one field of offsets."""
    modulated: bool = False
    """Learn a weight for every sampling location as well (deformable convolution, version 2)."""
    norm: Literal["trained", "frozen"] = "trained"
    """Batch norm: trained, or frozen as in the paper (which needs pretrained weights)."""
    weights: str | None = None
    """Starting weights: a torchvision name such as IMAGENET1K_V1, or a file; None is random."""

    short_side: int = 360
    """Shorter side of the images after resizing, in pixels, in training and evaluation."""
    max_side: int | None = 600
    """Longest side allowed after resizing, in pixels; such images end with a smaller short side."""
    crop: tuple[int, int] | None = None
    """Height and width of a random training crop, in pixels; None trains on whole images."""
    flip: bool = True
    """Mirror every second training image, at random."""

    batch: int = 8
    """Images per iteration, over all processes together."""
    iterations: int = 30_000
    """Iterations of training."""
    lr: float = 0.02
    """Learning rate of the first two thirds of the iterations; the last third has a tenth of it."""
    offset_lr_scale: float = 1.0
    """Factor on the learning rate of the layers that make offsets (beta in the paper)."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    warmup: int = 100
    """Iterations over which the learning rate rises linearly from a tenth to its full value."""
    clip: float | None = None
    """Largest norm of the gradient, beyond which it is scaled down; None never scales."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of training: float32, or mixed with bfloat16 or float16."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_a(value, hints[field.name]):
                raise TypeError(
                    f"{field.name} must be {_describe(hints[field.name])}, got {value!r}"
                )
        for name in ("dilation", "offset_groups", "short_side", "batch", "iterations", "lr"):
            if not 0 < getattr(self, name) < math.inf:  # NaN is neither
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("offset_lr_scale", "momentum", "weight_decay", "warmup", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_side is not None and self.max_side < self.short_side:
            raise ValueError(
                f"max_side must be at least short_side ({self.short_side}), got {self.max_side}"
            )
        if self.crop is not None and min(self.crop) <= 0:
            raise ValueError(f"crop must be positive, got {self.crop}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive, got {self.clip}")

    def build_model(self, num_classes: int) -> "DeepLab":
        """The network of this recipe, with its starting weights.

        Whatever is random in them comes from torch's global generator.

        Raises:
            FileNotFoundError: if `weights` is neither a known name nor a file.
        """
        from deformnet.backbones.resnet import resnet
        from deformnet.models.deeplab import DeepLab

        backbone = resnet(
            self.depth,
            deform_layers=self.deform_layers,
            dilation=self.dilation,
            offset_groups=self.offset_groups,
            modulated=self.modulated,
            norm=self.norm,
            weights=self.weights,
        )
        return DeepLab(backbone, num_classes)

    def lr_factor(self, iteration: int) -> float:
        """The learning rate of an iteration (counted from 0) as a fraction of `lr`."""
        if iteration < self.warmup:
            return 0.1 + 0.9 * iteration / self.warmup
        # In whole numbers, so that the drop never moves by an iteration through rounding.
        return 1.0 if 3 * iteration < 2 * self.iterations else 0.1

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str | Path) -> Self:
        """The recipe with these fields; fields that are left out have their defaults.

        Args:
            values: as `dataclasses.asdict` or `json.loads` give them.
            source: where the values come from, for the error messages.
        Raises:
            ValueError: if a field is unknown or its value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(
                f"{source}: a recipe has no field {unknown[0]!r}; its fields are {', '.join(known)}"
            )
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a recipe from a JSON file, such as the `recipe.json` of a run folder.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not JSON, or a field is unknown or its value is not allowed.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a recipe is a JSON object, got {type(values).__name__}")
        return cls.from_dict(values, source=path)


def voc2012(*, deform_layers: Literal[0, 1, 2, 3, 6] = 3) -> DeepLabRecipe:
    """The paper's DeepLab on PASCAL VOC 2012 (section 4.1): 30k iterations, 360 px, 8 images."""
    return DeepLabRecipe(
        depth=101,
        deform_layers=deform_layers,
        norm="frozen",
        weights="IMAGENET1K_V1",
        short_side=360,
        max_side=600,
        batch=8,
        iterations=30_000,
        lr=1e-3,
        warmup=0,
    )


def cityscapes(*, deform_layers: Literal[0, 1, 2, 3, 6] = 3) -> DeepLabRecipe:
    """The paper's DeepLab on Cityscapes (section 4.1): 45k iterations, 1024 px, 8 images.

    The crop and the warm-up are those of the authors' code; the paper does not mention them.
    """
    return DeepLabRecipe(
        depth=101,
        deform_layers=deform_layers,
        norm="frozen",
        weights="IMAGENET1K_V1",
        short_side=1024,
        max_side=2048,
        crop=(768, 1024),
        batch=8,
        iterations=45_000,
        lr=1e-3,
        warmup=1000,
    )


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value fits the annotation of a recipe field."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(v) and value == v for v in typing.get_args(hint))
    if origin is types.UnionType:
        return any(_is_a(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        parts = typing.get_args(hint)
        return (
            isinstance(value, tuple)
            and len(value) == len(parts)
            and all(_is_a(v, part) for v, part in zip(value, parts, strict=True))
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _describe(hint: Any) -> str:
    """An annotation of a recipe field in words."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    return str(hint) if typing.get_origin(hint) else hint.__name__
