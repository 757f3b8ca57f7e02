"""Recipes: which network, which image size and which schedule, in one frozen dataclass.

A recipe holds everything that decides the result of a training run except the data, and nothing
else: how many processes share the work, or how often a checkpoint is written, is not part of it.
"""

import dataclasses
import json
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

if TYPE_CHECKING:  # the command line reads recipes before anything heavy is needed
    from torch import nn

    from deformnet.models.backbones import Backbone
    from deformnet.models.classifier import Classifier
    from deformnet.models.deeplab import DeepLab
    from deformnet.models.detection.faster_rcnn import FasterRCNN
    from deformnet.models.detection.rfcn import RFCN
    from deformnet.models.detection.rpn import RPN, RPNDetector

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "aligned-inception-resnet"]
DeformLayers = Literal[0, 1, 2, 3, 6]
"""The numbers of deformable convolutions of Table 1."""
Sampling = Literal["bins", "msra", "aligned"]
"""The rules of RoI pooling; see `deformnet.ops.deform_roi_pool`."""
ScoreAt = Literal["original", "network"]
"""Where predicted label maps meet the ground truth: at the size of the label map on disk, to which
the logits are upsampled, or at the size of the network's input, to which the label map is resized
(the authors' rule on VOC: mean IoU at 360 pixels)."""
_Detector = TypeVar("_Detector", bound="DetectorRecipe")


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """What the recipes of all networks have in common: the backbone and the schedule.

    Their defaults train from random weights on one machine; the functions of this module give the
    paper's settings for fine-tuning.
    """

    network: ClassVar[str]
    """Name of the network, on the command line and in the file of a recipe."""
    takes_proposals: ClassVar[bool] = False
    """Whether the network can train on stored proposals."""

    backbone: BackboneName = "resnet50"
    """The network that makes the feature maps."""
    deform_layers: DeformLayers = 3
    """How many 3x3 convolutions, counted from the end, are deformable; 0 is the plain network."""
    offset_groups: int = 1
    """Groups of channels that share one field of offsets."""
    modulated: bool = False
    """Learn a weight for every sampling location as well (deformable convolution, version 2)."""
    norm: Literal["trained", "frozen"] = "trained"
    """Batch norm: trained, or frozen as in the paper (which needs pretrained weights)."""
    stride_in_1x1: bool = False
    """Where ResNet-50 and 101 stride: in 1x1 convolutions, as the authors' and detectron2's older
    weights want it, or in 3x3 ones, as torchvision's do."""
    init: str | None = None
    """Starting weights of the backbone: the run folder of a classifier or another network, a file,
    or a torchvision name such as IMAGENET1K_V1; None is random."""

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
    """Seed of the initial weights, the order of the images and whatever is drawn in training."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_a(value, hints[field.name]):
                raise TypeError(
                    f"{field.name} must be {_describe(hints[field.name])}, got {value!r}"
                )
        self._require_positive("offset_groups", "batch", "iterations", "lr")
        for name in ("offset_lr_scale", "momentum", "weight_decay", "warmup", "seed"):
            if not 0 <= getattr(self, name) < math.inf:  # NaN is neither
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.clip is not None:
            self._require_positive("clip")
        if self.stride_in_1x1 and self.backbone not in ("resnet50", "resnet101"):
            raise ValueError(
                f"stride_in_1x1 is for resnet50 and resnet101, whose blocks begin with a 1x1 "
                f"convolution, not for {self.backbone}"
            )

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @abstractmethod
    def build_model(self, num_classes: int) -> "nn.Module":
        """The network of this recipe, with its starting weights.

        Whatever is random in them comes from torch's global generator.

        Raises:
            FileNotFoundError: if `init` is neither a known name nor a file.
        """

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Largest height and width of an image in evaluation, in pixels."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """Return the recipe with all sizes of images multiplied by a factor."""

    def baseline(self) -> Self:
        """Return the recipe without deformable layers."""
        return dataclasses.replace(self, deform_layers=0)

    def lr_factor(self, iteration: int) -> float:
        """The learning rate of an iteration (counted from 0) as a fraction of `lr`."""
        if iteration < self.warmup:
            return 0.1 + 0.9 * iteration / self.warmup
        # In whole numbers, so that the drop never moves by an iteration through rounding.
        return 1.0 if 3 * iteration < 2 * self.iterations else 0.1

    def to_dict(self) -> dict[str, Any]:
        """The recipe in plain values, as `recipe_from_dict` reads it."""
        return {"network": self.network, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a recipe of this network from a JSON file, such as the `recipe.json` of a run.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not JSON, is a recipe of another network, or a field is unknown or
                its value is not allowed.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a recipe is a JSON object, got {type(values).__name__}")
        recipe = recipe_from_dict(values, source=path)
        if not isinstance(recipe, cls):
            raise ValueError(f"{path}: wanted a recipe of {cls.network}, got {recipe.network}")
        return recipe


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """Image classification, which pre-trains a backbone (Dai et al. 2017, appendix B)."""

    network: ClassVar[str] = "classifier"

    deform_layers: DeformLayers = 0
    """How many 3x3 convolutions, counted from the end, are deformable; 0 is the plain network."""
    resize: tuple[int, int] = (256, 480)
    """Smallest and largest shorter side of the images after resizing, in pixels, in training;
    every length between them is as likely."""
    crop: int = 224
    """Side of the square that the network sees, in pixels: cut at random in training, from the
    centre in testing."""
    test_short_side: int = 256
    """Shorter side of the images after resizing, in pixels, in testing."""
    color_jitter: bool = True
    """Shift the colors of training images randomly (Krizhevsky et al. 2012, section 4.1)."""
    batch: int = 32
    """Images per iteration, over all processes together."""
    lr: float = 0.01
    """Learning rate of the first third of the iterations; each further third has a tenth of the
    one before."""
    weight_decay: float = 1e-4
    """Weight decay of SGD."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("crop", "test_short_side")
        smallest, largest = self.resize
        if not 0 < smallest <= largest:
            raise ValueError(f"resize must be positive and in order, got {self.resize}")
        if self.crop > smallest:
            raise ValueError(
                f"crop must be at most the smallest resize ({smallest}), got {self.crop}"
            )
        if self.crop > self.test_short_side:
            raise ValueError(
                f"crop must be at most test_short_side ({self.test_short_side}), got {self.crop}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        return self.test_short_side, self.test_short_side

    def scaled(self, factor: float) -> Self:
        smallest, largest = self.resize
        return dataclasses.replace(
            self,
            resize=(round(factor * smallest), round(factor * largest)),
            crop=round(factor * self.crop),
            test_short_side=round(factor * self.test_short_side),
        )

    def lr_factor(self, iteration: int) -> float:
        if iteration < self.warmup:
            return super().lr_factor(iteration)
        # In whole numbers; the optimiser asks for the iteration after the last, too.
        return (1.0, 0.1, 0.01)[min(2, 3 * iteration // self.iterations)]

    def build_model(self, num_classes: int) -> "Classifier":
        from deformnet.models.backbones import backbone
        from deformnet.models.classifier import Classifier

        features = backbone(
            self.backbone,
            deform_layers=self.deform_layers,
            offset_groups=self.offset_groups,
            modulated=self.modulated,
            norm=self.norm,
            stride_in_1x1=self.stride_in_1x1,
            output_stride=32,
            weights=self.init,
            reduce_channels=None,
        )
        return Classifier(features, num_classes)


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe):
    """What the recipes of networks have in common that say where something is in the image."""

    dilation: int = 2
    """Dilation of conv5, whose stride is 1."""
    short_side: int = 600
    """Shorter side of the images after resizing, in pixels, in training and evaluation."""
    max_side: int | None = 1000
    """Longest side allowed after resizing, in pixels; such images end with a smaller short side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("dilation", "short_side")
        if self.max_side is not None and self.max_side < self.short_side:
            raise ValueError(
                f"max_side must be at least short_side ({self.short_side}), got {self.max_side}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        return self.short_side, self.max_side or self.short_side

    def scaled(self, factor: float) -> Self:
        return dataclasses.replace(
            self,
            short_side=round(factor * self.short_side),
            max_side=None if self.max_side is None else round(factor * self.max_side),
        )

    def _backbone(self, reduce_channels: int) -> "Backbone":
        from deformnet.models.backbones import backbone

        return backbone(
            self.backbone,
            deform_layers=self.deform_layers,
            dilation=self.dilation,
            offset_groups=self.offset_groups,
            modulated=self.modulated,
            norm=self.norm,
            stride_in_1x1=self.stride_in_1x1,
            weights=self.init,
            reduce_channels=reduce_channels,
        )


@dataclass(frozen=True, kw_only=True)
class DeepLabRecipe(DenseRecipe):
    """DeepLab, plain or deformable (Dai et al. 2017, section 2.3)."""

    network: ClassVar[str] = "deeplab"

    short_side: int = 360
    """Shorter side of the images after resizing, in pixels, in training and evaluation."""
    max_side: int | None = 600
    """Longest side allowed after resizing, in pixels; such images end with a smaller short side."""
    crop: tuple[int, int] | None = None
    """Height and width of a random training crop, in pixels; None trains on whole images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop is not None and min(self.crop) <= 0:
            raise ValueError(f"crop must be positive, got {self.crop}")

    def scaled(self, factor: float) -> Self:
        recipe = super().scaled(factor)
        if self.crop is None:
            return recipe
        height, width = self.crop
        return dataclasses.replace(recipe, crop=(round(factor * height), round(factor * width)))

    def build_model(self, num_classes: int) -> "DeepLab":
        from deformnet.models.deeplab import DeepLab

        return DeepLab(self._backbone(1024), num_classes)


@dataclass(frozen=True, kw_only=True)
class DetectorRecipe(DenseRecipe):
    """What the recipes of all detectors have in common."""

    class_agnostic: ClassVar[bool] = False
    """Whether the network finds objects without telling their classes."""

    convention: Literal["modern", "msra2017"] = "modern"
    """The authors' conventions of 2017, or today's: where anchors sit and which of them train,
    objects' boxes rounded to whole pixels after resizing or not, 11-point AP or the area."""
    anchor_sizes: tuple[int, ...] = (128, 256, 512)
    """Square roots of the areas of the anchors, in pixels of the resized image."""
    proposals: int = 300
    """Proposals of each image, in training and testing."""
    score_threshold: float = 1e-3
    """Detections with a lower score are left out."""
    nms: float = 0.3
    """Of two detections of a class with a larger IoU than this, the lower score goes."""
    max_detections: int = 300
    """Most detections of an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("proposals", "max_detections")
        if not self.anchor_sizes or min(self.anchor_sizes) <= 0:
            raise ValueError(f"anchor_sizes must be positive, got {self.anchor_sizes}")
        for name in ("score_threshold", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")

    def _rpn(self, backbone: "Backbone") -> "RPN":
        from deformnet.models.detection.rpn import RPN

        return RPN(
            backbone.conv4_channels,
            sizes=self.anchor_sizes,
            convention=self.convention,
            post_nms=self.proposals,
        )


@dataclass(frozen=True, kw_only=True)
class RPNRecipe(DetectorRecipe):
    """A region proposal network on conv4, to make proposals for other networks."""

    network: ClassVar[str] = "rpn"
    class_agnostic: ClassVar[bool] = True

    deform_layers: DeformLayers = 0
    """Leave it at 0: a proposal network does not see the deformable layers of conv5."""

    def build_model(self, num_classes: int) -> "RPNDetector":
        return _rpn_detector(self, num_classes, class_aware=False)


@dataclass(frozen=True, kw_only=True)
class ClassAwareRPNRecipe(DetectorRecipe):
    """Class-aware RPN: each anchor is scored for every class (Dai et al. 2017, section 2.3)."""

    network: ClassVar[str] = "class-aware-rpn"

    def build_model(self, num_classes: int) -> "RPNDetector":
        return _rpn_detector(self, num_classes, class_aware=True)


@dataclass(frozen=True, kw_only=True)
class FasterRCNNRecipe(DetectorRecipe):
    """Faster R-CNN with two fully connected layers (Dai et al. 2017, section 2.3)."""

    network: ClassVar[str] = "faster-rcnn"
    takes_proposals: ClassVar[bool] = True

    pool: Literal["max", "average", "deformable"] = "deformable"
    """RoI pooling; plain is max, as the authors', or average, as deformable without offsets."""
    sampling: Sampling = "bins"
    """Rule of average and deformable pooling: the paper's, the authors' code's, RoIAlign's."""
    bins: int = 7
    """Bins of a box in height and in width."""

    def baseline(self) -> Self:
        return dataclasses.replace(super().baseline(), pool="max")

    def build_model(self, num_classes: int) -> "FasterRCNN":
        from deformnet.models.detection.faster_rcnn import FasterRCNN

        backbone = self._backbone(256)
        return FasterRCNN(
            backbone,
            num_classes,
            self._rpn(backbone),
            pool=self.pool,
            sampling=self.sampling,
            bins=self.bins,
        )


@dataclass(frozen=True, kw_only=True)
class RFCNRecipe(DetectorRecipe):
    """R-FCN: position-sensitive score maps and pooling (Dai et al. 2017, section 2.3)."""

    network: ClassVar[str] = "rfcn"
    takes_proposals: ClassVar[bool] = True

    pool: Literal["average", "deformable"] = "deformable"
    """Position-sensitive RoI pooling."""
    sampling: Sampling = "bins"
    """Rule of the pooling: the paper's, the authors' code's, RoIAlign's."""
    bins: int = 7
    """Bins of a box in height and in width."""

    def baseline(self) -> Self:
        return dataclasses.replace(super().baseline(), pool="average")

    def build_model(self, num_classes: int) -> "RFCN":
        from deformnet.models.detection.rfcn import RFCN

        backbone = self._backbone(1024)
        return RFCN(
            backbone,
            num_classes,
            self._rpn(backbone),
            pool=self.pool,
            sampling=self.sampling,
            bins=self.bins,
        )


@dataclass(frozen=True, kw_only=True)
class TestTimeAugmentation:
    """Test-time augmentation of detectors; the defaults run the network once on an image.

    The paper's "M" is `scales=(480, 576, 688, 864, 1200, 1400)`, and its "B" (iterative bounding
    box average) is `refine=2, box_averaging=True`.
    """

    scales: tuple[int, ...] = ()
    """Shorter sides, in pixels, at which the network sees the image; none: as in training."""
    flip: bool = False
    """Look at the mirrored image as well, at each size."""
    refine: int = 1
    """How often boxes pass through the detector; from the second time on, those found before are
    its proposals. What all passes found counts."""
    box_averaging: bool = False
    """Report, for each box, the mean of those around it, weighted by their scores."""
    soft_nms: bool = False
    """Lower the scores of boxes that overlap better ones, where otherwise they are dropped."""

    def __post_init__(self) -> None:
        if any(side < 1 for side in self.scales):
            raise ValueError(f"scales must be at least 1 pixel, got {self.scales}")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales must differ from one another, got {self.scales}")
        if self.refine < 1:
            raise ValueError(f"refine must be at least 1, got {self.refine}")


RECIPES = (
    DeepLabRecipe,
    RPNRecipe,
    ClassAwareRPNRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    ClassifierRecipe,
)
"""A recipe class for every network."""


def recipe_from_dict(values: Mapping[str, Any], *, source: str | Path) -> Recipe:
    """The recipe with these fields; fields that are left out have their defaults.

    Args:
        values: as `Recipe.to_dict` or `json.loads` give them. Without "network" it is DeepLab.
        source: where the values come from, for the error messages.
    Raises:
        ValueError: if the network or a field is unknown or its value is not allowed.
    """
    by_name = {recipe.network: recipe for recipe in RECIPES}
    network = values.get("network", DeepLabRecipe.network)
    if network not in by_name:
        raise ValueError(
            f"{source}: there is no network {network!r}; the networks are {', '.join(by_name)}"
        )
    recipe = by_name[network]
    known = [field.name for field in dataclasses.fields(recipe)]
    fields: dict[str, Any] = {}
    for name, value in _renamed(values).items():
        if name == "network":
            continue
        if name not in known:
            raise ValueError(
                f"{source}: a recipe of {network} has no field {name!r}; "
                f"its fields are {', '.join(known)}"
            )
        fields[name] = tuple(value) if isinstance(value, list) else value
    try:
        return recipe(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by today's names; the runs of version 0.1 have two others."""
    now = dict(values)
    if "depth" in now:
        now["backbone"] = f"resnet{now.pop('depth')}"
    if "weights" in now:
        now["init"] = now.pop("weights")
    return now


def _rpn_detector(recipe: DetectorRecipe, num_classes: int, *, class_aware: bool) -> "RPNDetector":
    from deformnet.models.detection.rpn import RPNDetector

    return RPNDetector(
        recipe._backbone(1024),
        num_classes,
        class_aware=class_aware,
        sizes=recipe.anchor_sizes,
        convention=recipe.convention,
        post_nms=recipe.proposals,
    )


def voc2012(*, deform_layers: DeformLayers = 3) -> DeepLabRecipe:
    """The paper's DeepLab on PASCAL VOC 2012 (section 4.1): 30k iterations, 360 px, 8 images."""
    return DeepLabRecipe(
        backbone="resnet101",
        deform_layers=deform_layers,
        norm="frozen",
        init="IMAGENET1K_V1",
        short_side=360,
        max_side=600,
        batch=8,
        iterations=30_000,
        lr=1e-3,
        warmup=0,
    )


def cityscapes(*, deform_layers: DeformLayers = 3) -> DeepLabRecipe:
    """The paper's DeepLab on Cityscapes (section 4.1): 45k iterations, 1024 px, 8 images.

    The crop and the warm-up are those of the authors' code; the paper does not mention them.
    """
    return DeepLabRecipe(
        backbone="resnet101",
        deform_layers=deform_layers,
        norm="frozen",
        init="IMAGENET1K_V1",
        short_side=1024,
        max_side=2048,
        crop=(768, 1024),
        batch=8,
        iterations=45_000,
        lr=1e-3,
        warmup=1000,
    )


def imagenet(*, backbone: BackboneName) -> ClassifierRecipe:
    """The paper's pre-training on ImageNet (appendix B, Table 7), by the settings of its [22].

    He et al. 2016, "Deep residual learning for image recognition", section 3.4: 600k iterations of
    256 images; shorter sides from 256 to 480, crops of 224; testing with the central crop at 256.
    Its learning rate falls tenfold whenever the error no longer does, here after each third.
    """
    return ClassifierRecipe(
        backbone=backbone,
        resize=(256, 480),
        crop=224,
        test_short_side=256,
        color_jitter=True,
        flip=True,
        batch=256,
        iterations=600_000,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        warmup=0,
    )


def voc_detection(recipe: type[_Detector]) -> _Detector:
    """The paper's settings of a detector on PASCAL VOC (section 4.2), by the authors' conventions.

    30k iterations of 8 images at 600 pixels, pre-trained and frozen as for the segmentation. The
    warm-up is that of the authors' code. `dataclasses.replace` makes a row of Table 1 or 3 of it.
    """
    return recipe(
        backbone="resnet101",
        norm="frozen",
        init="IMAGENET1K_V1",
        batch=8,
        iterations=30_000,
        lr=1e-3,
        warmup=1000,
        convention="msra2017",
    )


def coco_detection(recipe: type[_Detector]) -> _Detector:
    """The paper's settings of a detector on COCO (section 4.2): 240k iterations, small anchors."""
    return dataclasses.replace(
        voc_detection(recipe),
        iterations=240_000,
        anchor_sizes=(64, 128, 256, 512),
        max_detections=100,
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
        if parts[-1] is Ellipsis:
            return isinstance(value, tuple) and all(_is_a(v, parts[0]) for v in value)
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
