"""Recipes: network, image size and training schedule in one frozen dataclass.

A recipe contains everything that determines the result of a training run, except the data, and
nothing else. The number of processes and the checkpoint interval, for example, are not part of it.
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

from deformnet._errors import UserError, require_at_least, require_at_most
from deformnet._files import read_json

if TYPE_CHECKING:  # the command line reads recipes before anything heavy is needed
    from deformnet.models.backbones import Backbone, InterpolationMode
    from deformnet.models.classifier import Classifier
    from deformnet.models.deeplab import DeepLab
    from deformnet.models.detection.faster_rcnn import FasterRCNN
    from deformnet.models.detection.rfcn import RFCN
    from deformnet.models.detection.rpn import RPN, RPNDetector
    from deformnet.models.network import Network

BackboneName = str
"""One of `BACKBONES`, or timm/NAME."""
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "aligned-inception-resnet")
DeformLayers = Literal[0, 1, 2, 3, 6]
"""Numbers of deformable convolutions in Table 1."""
Sampling = Literal["bins", "msra", "aligned"]
"""Sampling rules of RoI pooling; see `deformnet.ops.deform_roi_pool`."""
OutputStride = Literal[8, 16, 32]
ScoreAt = Literal["original", "network"]
"""Size at which predicted label maps are compared with the ground truth: that of the label map on
disk, to which the logits are upsampled, or that of the network's input, to which the label map is
resized (the authors' rule on VOC: mean IoU at 360 pixels)."""
_MOST_PIXELS = 2**15  # maximum side of an image
_RecipeT = TypeVar("_RecipeT", bound="Recipe")
_Detector = TypeVar("_Detector", bound="DetectorRecipe")


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Base class of the recipes: the backbone and the schedule.

    The defaults train from random weights on one machine. The functions of this module return
    other settings: `finetune` for your own data, and those of the paper.

    Raises:
        TypeError: if a field has the wrong type.
        UserError: if a value is out of range.
    """

    network: ClassVar[str]
    """Name of the network on the command line and in recipe files."""
    takes_proposals: ClassVar[bool] = False
    """Whether the network can train on stored proposals."""
    pixels: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that are image sizes."""

    backbone: BackboneName = "resnet50"
    """Backbone network: resnet18, resnet34, resnet50, resnet101, aligned-inception-resnet, or
    timm/NAME for a convolutional network of timm."""
    neck: Literal["none", "residual"] = "none"
    """Neck between the backbone and the heads: residual adds 3x3 convolutions in the role of the
    paper's conv5, for backbones that end in depthwise convolutions. Region proposal networks run on
    the last feature map of the backbone."""
    neck_layers: int = 3
    """Number of 3x3 convolutions in the neck."""
    neck_channels: int = 96
    """Number of channels in the neck."""
    deform_layers: int = 3
    """Number of deformable 3x3 convolutions, counted from the last; 0 is the baseline. For timm
    networks, all convolutions larger than 1x1 count; with a neck, those in the neck."""
    offset_groups: int = 1
    """Number of offset groups: groups of channels with their own offsets."""
    modulated: bool = False
    """Also learn a modulation mask (DCNv2)."""
    offset_conv: Literal["dense", "separable"] = "dense"
    """Convolution that predicts offsets: dense as in the paper, or separable, depthwise and 1x1,
    which is far cheaper in backbones of depthwise convolutions."""
    norm: Literal["trained", "frozen"] = "trained"
    """Batch norm: trained, or frozen as in the paper (requires pretrained weights)."""
    freeze: int | None = None
    """Number of stages of the backbone to freeze: 4 for all up to conv4, 5 for conv5 as well;
    requires frozen batch norm. None freezes conv1 and conv2 with frozen batch norm, as in the
    paper, and nothing otherwise."""
    stride_in_1x1: bool = False
    """For ResNet-50 and 101: put the stride in the 1x1 convolutions, as the weights of the authors
    and of older detectron2 models expect, not in the 3x3 convolutions, as torchvision does."""
    init: str | None = None
    """Initial weights of the backbone: a run folder, a file, hf://OWNER/REPO (an exported network
    on the Hugging Face Hub), an installed package that contains a file, a torchvision name such as
    IMAGENET1K_V1, or timm (timm's hub); None initializes randomly."""

    flip: bool = True
    """Flip images horizontally with probability 0.5."""
    orientation: Literal["auto", "stored", "upright"] = "auto"
    """Orientation of images with an EXIF orientation tag: stored, upright, or auto, which selects
    the one that matches the annotated image size (upright if both match)."""

    batch: int = 8
    """Batch size: images per iteration, over all processes."""
    iterations: int = 30_000
    """Number of training iterations."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: SGD with momentum, or AdamW."""
    schedule: Literal["step", "cosine"] = "step"
    """Learning rate schedule after the warmup: steps (see `lr`), or a half cosine down to 0."""
    lr: float = 0.02
    """Learning rate; the step schedule divides it by 10 after two thirds of the iterations."""
    offset_lr_scale: float = 1.0
    """Learning rate multiplier of the offset layers (beta in the paper)."""
    momentum: float = 0.9
    """SGD momentum, or beta1 of AdamW."""
    weight_decay: float = 5e-4
    """Weight decay."""
    warmup: int = 100
    """Number of warmup iterations, over which the learning rate grows linearly from `lr` / 10."""
    clip: float | None = None
    """Maximum gradient norm for clipping; None disables clipping."""
    ema: float | None = None
    """Decay of the exponential moving average (EMA) of the weights, which is then the trained
    network; None disables averaging."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Training precision: float32, or mixed with bfloat16 or float16."""
    seed: int = 0
    """Random seed of the initial weights, the order of the images and the augmentation."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_a(value, hints[field.name]):
                raise TypeError(
                    f"expected {field.name} to be {_describe(hints[field.name])}, but got {value!r}"
                )
        self._require_positive("offset_groups", "batch", "iterations", "lr", "clip", *self.pixels)
        self._require_positive("neck_layers", "neck_channels")
        if self.backbone not in BACKBONES and not self.backbone.startswith("timm/"):
            raise UserError(
                f"expected backbone to be one of {', '.join(BACKBONES)} or timm/NAME, "
                f"but got {self.backbone}"
            )
        for name in (
            "deform_layers",
            "offset_lr_scale",
            "momentum",
            "weight_decay",
            "warmup",
            "seed",
        ):
            if not 0 <= getattr(self, name) < math.inf:  # NaN is neither
                raise UserError(
                    f"expected {name} to be 0 or positive, but got {getattr(self, name)}"
                )
        require_at_most(self, _MOST_PIXELS, *self.pixels)
        require_at_most(self, 1024, "offset_groups", "neck_layers")
        require_at_most(self, 2**16, "neck_channels")
        require_at_most(self, 2**16, "batch")
        require_at_most(self, 1e12, "iterations", "warmup")
        require_at_most(self, 1e6, "lr", "offset_lr_scale", "weight_decay", "clip")
        require_at_most(self, 2**63 - 1, "seed")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"expected ema to be between 0 and 1, but got {self.ema}")
        if not self.momentum < 1:
            raise UserError(f"expected momentum to be below 1, but got {self.momentum}")
        if self.freeze is not None and not 0 <= self.freeze <= 5:
            raise UserError(f"expected freeze to be 0 to 5, but got {self.freeze}")
        if self.freeze and self.norm == "trained":
            raise UserError(
                f"expected norm to be frozen for freeze ({self.freeze}), whose stages have batch "
                "norm, but got trained"
            )
        if self.stride_in_1x1 and self.backbone not in ("resnet50", "resnet101"):
            raise UserError(
                "expected backbone to be resnet50 or resnet101 for stride_in_1x1, whose blocks "
                f"begin with a 1x1 convolution, but got {self.backbone}"
            )

    def _require_positive(self, *names: str) -> None:
        """Checks fields that are numbers, tuples of numbers, or None."""
        for name in names:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            if value == () or not all(0 < one < math.inf for one in values):
                raise UserError(f"expected {name} to be positive, but got {value}")

    @abstractmethod
    def build_model(self, num_classes: int) -> "Network":
        """Builds the network with its initial weights.

        Random weights are drawn from PyTorch's global generator.

        Raises:
            FileNotFoundError: if `init` is neither a known name nor a file.
        """

    def _backbone(
        self,
        reduce_channels: int | None,
        *,
        dilation: int = 2,
        output_stride: OutputStride = 16,
        center: bool = True,
    ) -> "Backbone":
        from deformnet.models.backbones import backbone

        return backbone(
            self.backbone,
            deform_layers=self.deform_layers,
            dilation=dilation,
            offset_groups=self.offset_groups,
            modulated=self.modulated,
            offset_conv=self.offset_conv,
            norm=self.norm,
            freeze=self.freeze,
            stride_in_1x1=self.stride_in_1x1,
            output_stride=output_stride,
            center=center,
            weights=self.init,
            reduce_channels=reduce_channels,
            neck=self.neck,
            neck_channels=self.neck_channels,
            neck_layers=self.neck_layers,
        )

    @property
    def interpolation(self) -> "InterpolationMode":
        """How images are resized: as for the published weights of the backbone."""
        from deformnet.models.backbones import interpolation

        return interpolation(self.backbone)

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Shorter and longer side of the largest image in evaluation, in pixels."""

    def scaled(self, factor: float) -> Self:
        """Returns the recipe with all image sizes multiplied by a factor."""
        sizes = {name: _times(getattr(self, name), factor) for name in self.pixels}
        return dataclasses.replace(self, **sizes)

    def baseline(self) -> Self:
        """Returns the recipe without deformable layers."""
        return dataclasses.replace(self, deform_layers=0)

    def fitted(self, short_side: int) -> Self:
        """Returns the recipe adapted to images of this size, with augmentation; see `finetune`."""
        return self

    @classmethod
    def published(cls) -> "Recipe":
        """Returns the paper's settings for the network on VOC or ImageNet."""
        return cls()

    def lr_factor(self, iteration: int) -> float:
        """The learning rate of an iteration (counted from 0) as a fraction of `lr`."""
        if iteration < self.warmup:
            return 0.1 + 0.9 * iteration / self.warmup
        if self.schedule == "step":
            return self._step_factor(iteration)
        done = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))

    def _step_factor(self, iteration: int) -> float:
        # In integers, so that rounding never moves the drop by an iteration.
        return 1.0 if 3 * iteration < 2 * self.iterations else 0.1

    def to_dict(self) -> dict[str, Any]:
        """The recipe in plain values; the inverse of `recipe_from_dict`."""
        return {"network": self.network, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a recipe of this network from a JSON file, such as the `recipe.json` of a run.

        Raises:
            FileNotFoundError: if there is no such file.
            UserError: if it is not JSON, is a recipe of another network, or a field is unknown or
                has an invalid value.
        """
        values = read_json(Path(path))
        if not isinstance(values, dict):
            raise UserError(
                f"{path}: expected a recipe, a JSON object, but got {type(values).__name__}"
            )
        recipe = recipe_from_dict(values, source=path)
        if not isinstance(recipe, cls):
            raise UserError(f"{path}: expected a recipe of {cls.network}, but got {recipe.network}")
        return recipe


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """Image classification, to pretrain backbones (Dai et al. 2017, appendix B)."""

    network: ClassVar[str] = "classifier"
    pixels: ClassVar[tuple[str, ...]] = ("resize", "crop", "test_short_side")

    deform_layers: int = 0
    """Number of deformable 3x3 convolutions, counted from the last; 0 is the baseline."""
    resize: tuple[int, int] = (256, 480)
    """Minimum and maximum shorter side of training images after random resizing, in pixels."""
    crop: int = 224
    """Side of the square crop, in pixels: random in training, central in evaluation."""
    test_short_side: int = 256
    """Shorter side of the images after resizing in evaluation, in pixels."""
    color_jitter: bool = True
    """Apply random PCA color jitter (Krizhevsky et al. 2012, section 4.1)."""
    batch: int = 32
    """Batch size: images per iteration, over all processes."""
    lr: float = 0.01
    """Learning rate; the step schedule divides it by 10 after each third of the iterations."""
    weight_decay: float = 1e-4
    """Weight decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest, largest = self.resize
        if smallest > largest:
            raise UserError(f"expected resize to be ascending, but got {self.resize}")
        limits = {"the smallest resize": smallest, "test_short_side": self.test_short_side}
        for name, limit in limits.items():
            if self.crop > limit:
                raise UserError(
                    f"expected crop to be at most {name} ({limit}), but got {self.crop}"
                )

    @property
    def image_size(self) -> tuple[int, int]:
        return self.test_short_side, self.test_short_side

    def _step_factor(self, iteration: int) -> float:
        # In integers; the optimizer also asks for the iteration after the last.
        return (1.0, 0.1, 0.01)[min(2, 3 * iteration // self.iterations)]

    def build_model(self, num_classes: int) -> "Classifier":
        from deformnet.models.classifier import Classifier

        return Classifier(self._backbone(None, output_stride=32, center=False), num_classes)

    @classmethod
    def published(cls) -> "Recipe":
        return imagenet(backbone="resnet50")


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe):
    """Base class of the recipes of networks with dense predictions."""

    pixels: ClassVar[tuple[str, ...]] = ("short_side", "max_side", "crop")

    dilation: int = 2
    """Dilation of conv5, whose stride is 1, or of the neck if there is one, at output stride 16."""
    short_side: int = 600
    """Shorter side of the images after resizing, in pixels."""
    max_side: int | None = 1000
    """Maximum longer side after resizing, in pixels, which takes precedence; None for no limit."""
    scale_jitter: tuple[float, float] | None = None
    """Minimum and maximum factor of random resizing during training, relative to the size above;
    None disables it."""
    color_jitter: bool = False
    """Randomly change brightness, contrast, saturation and hue during training."""
    crop: tuple[int, int] | None = None
    """Height and width of the random training crop, in pixels; None trains on whole images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("dilation", "scale_jitter")
        require_at_most(self, 100, "dilation", "scale_jitter")
        if self.scale_jitter is not None and self.scale_jitter[0] > self.scale_jitter[1]:
            raise UserError(f"expected scale_jitter to be ascending, but got {self.scale_jitter}")
        if self.max_side is not None and self.max_side < self.short_side:
            raise UserError(
                f"expected max_side to be at least short_side ({self.short_side}), "
                f"but got {self.max_side}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        return self.short_side, self.max_side or self.short_side

    def fitted(self, short_side: int) -> Self:
        return dataclasses.replace(
            self,
            short_side=short_side,
            max_side=round(short_side * 5 / 3),
            scale_jitter=(0.75, 1.25),
            color_jitter=True,
        )


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """Base class of the recipes for semantic segmentation."""

    short_side: int = 360
    """Shorter side of the images after resizing, in pixels."""
    max_side: int | None = 600
    """Maximum longer side after resizing, in pixels, which takes precedence; None for no limit."""
    output_stride: OutputStride = 16
    """Stride of the features, in pixels: 16 as in the paper; 8 for finer features, at about four
    times the cost of conv4 and conv5, whose dilation doubles; or 32 for coarser ones, without
    dilation."""
    loss_stride: Literal[1, 2, 4, 8, 16] = 1
    """Stride at which predictions and labels are compared in training, in pixels; larger values
    take less time on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_stride % self.loss_stride:
            raise UserError(
                f"expected loss_stride to be at most output_stride ({self.output_stride}), "
                f"but got {self.loss_stride}"
            )
        if self.output_stride == 32 and self.dilation != 2:
            raise UserError(
                "expected dilation to be 2, the default, for output_stride 32, which does not "
                f"dilate, but got {self.dilation}"
            )
        if self.output_stride == 32 and self.freeze == 5 and self.neck == "none":
            raise UserError(
                "expected output_stride to be 8 or 16 for freeze 5 without a neck, but got 32; add "
                "a neck, or freeze 4 stages"
            )


@dataclass(frozen=True, kw_only=True)
class DeepLabRecipe(SegmentationRecipe):
    """DeepLab, deformable or baseline (Dai et al. 2017, section 2.3)."""

    network: ClassVar[str] = "deeplab"

    def build_model(self, num_classes: int) -> "DeepLab":
        from deformnet.models.deeplab import DeepLab

        backbone = self._backbone(1024, dilation=self.dilation, output_stride=self.output_stride)
        return DeepLab(backbone, num_classes, self.loss_stride)

    @classmethod
    def published(cls) -> "Recipe":
        return voc2012()


@dataclass(frozen=True, kw_only=True)
class DetectorRecipe(DenseRecipe):
    """Base class of the recipes of detectors."""

    class_agnostic: ClassVar[bool] = False
    """Whether the network detects objects without predicting their classes."""

    convention: Literal["modern", "msra2017"] = "modern"
    """Conventions of the authors' code (msra2017) or of current practice (modern): anchor
    positions, anchor sampling, rounding of boxes to pixels after resizing, 11-point or area AP."""
    anchor_sizes: tuple[int, ...] = (128, 256, 512)
    """Anchor sizes (square roots of the areas), in pixels of the resized image."""
    proposals: int = 300
    """Number of proposals per image."""
    score_threshold: float = 1e-3
    """Minimum score of a detection."""
    nms: float = 0.3
    """IoU threshold of non-maximum suppression."""
    max_detections: int = 300
    """Maximum number of detections per image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("proposals", "max_detections", "anchor_sizes")
        require_at_most(self, 1e5, "proposals", "max_detections")
        require_at_most(self, _MOST_PIXELS, "anchor_sizes")
        for name in ("score_threshold", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"expected {name} to be 0 to 1, but got {getattr(self, name)}")

    def fitted(self, short_side: int) -> Self:
        """Returns the adapted recipe, with anchors from 16 pixels up to the image size as well."""
        sizes = tuple(size for size in (16, 32, 64, 128, 256) if size <= short_side)
        return dataclasses.replace(super().fitted(short_side), anchor_sizes=sizes)

    @classmethod
    def published(cls) -> "Recipe":
        return voc_detection(cls)

    def _rpn(self, in_channels: int, num_classes: int = 1) -> "RPN":
        from deformnet.models.detection.rpn import RPN

        return RPN(
            in_channels,
            num_classes,
            sizes=self.anchor_sizes,
            convention=self.convention,
            post_nms=self.proposals,
        )


@dataclass(frozen=True, kw_only=True)
class RPNRecipe(DetectorRecipe):
    """Region proposal network on conv4, which generates proposals for other detectors."""

    network: ClassVar[str] = "rpn"
    class_agnostic: ClassVar[bool] = True

    deform_layers: int = 0
    """Leave at 0: the network does not run conv5, which has the deformable layers."""

    def build_model(self, num_classes: int) -> "RPNDetector":
        from deformnet.models.detection.rpn import RPNDetector

        backbone = self._backbone(1024, dilation=self.dilation)
        return RPNDetector(backbone, self._rpn(backbone.conv4_channels), class_aware=False)


@dataclass(frozen=True, kw_only=True)
class ClassAwareRPNRecipe(DetectorRecipe):
    """Class-aware RPN, which scores each anchor for every class (Dai et al. 2017, section 2.3)."""

    network: ClassVar[str] = "class-aware-rpn"

    def build_model(self, num_classes: int) -> "RPNDetector":
        from deformnet.models.detection.rpn import RPNDetector

        backbone = self._backbone(1024, dilation=self.dilation)
        rpn = self._rpn(backbone.out_channels, num_classes)
        return RPNDetector(backbone, rpn, class_aware=True)


@dataclass(frozen=True, kw_only=True)
class TwoStageRecipe(DetectorRecipe):
    """Base class of the recipes of detectors with RoI pooling."""

    takes_proposals: ClassVar[bool] = True

    sampling: Sampling = "bins"
    """Sampling rule of average and deformable pooling: the paper's (bins), that of the authors'
    code (msra), or RoIAlign's (aligned)."""
    bins: int = 7
    """Number of bins in each direction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("bins")
        require_at_most(self, 100, "bins")


@dataclass(frozen=True, kw_only=True)
class FasterRCNNRecipe(TwoStageRecipe):
    """Faster R-CNN with two fully connected layers (Dai et al. 2017, section 2.3)."""

    network: ClassVar[str] = "faster-rcnn"

    pool: Literal["max", "average", "deformable"] = "deformable"
    """RoI pooling. Baselines use max, as in the authors' code, or average, which is deformable
    pooling without offsets."""

    def baseline(self) -> Self:
        return dataclasses.replace(super().baseline(), pool="max")

    def build_model(self, num_classes: int) -> "FasterRCNN":
        from deformnet.models.detection.faster_rcnn import FasterRCNN

        backbone = self._backbone(256, dilation=self.dilation)
        rpn = self._rpn(backbone.conv4_channels)
        return FasterRCNN(
            backbone, num_classes, rpn, pool=self.pool, sampling=self.sampling, bins=self.bins
        )


@dataclass(frozen=True, kw_only=True)
class RFCNRecipe(TwoStageRecipe):
    """R-FCN: position-sensitive score maps and pooling (Dai et al. 2017, section 2.3)."""

    network: ClassVar[str] = "rfcn"

    pool: Literal["average", "deformable"] = "deformable"
    """Position-sensitive RoI pooling."""

    def baseline(self) -> Self:
        return dataclasses.replace(super().baseline(), pool="average")

    def build_model(self, num_classes: int) -> "RFCN":
        from deformnet.models.detection.rfcn import RFCN

        backbone = self._backbone(1024, dilation=self.dilation)
        rpn = self._rpn(backbone.conv4_channels)
        return RFCN(
            backbone, num_classes, rpn, pool=self.pool, sampling=self.sampling, bins=self.bins
        )


@dataclass(frozen=True, kw_only=True)
class TestTimeAugmentation:
    """Test-time augmentation of detectors; none by default.

    The paper's "M" is `scales=(480, 576, 688, 864, 1200, 1400)`, and its "B" (iterative bounding
    box average) is `refine=2, box_averaging=True`.
    """

    scales: tuple[int, ...] = ()
    """Shorter sides of the image, in pixels; empty uses that of training."""
    flip: bool = False
    """Also process the horizontally flipped image at each scale."""
    refine: int = 1
    """Number of passes through the box head. The boxes of each pass are the proposals of the next,
    and the candidates of all passes are merged."""
    box_averaging: bool = False
    """Average each box with the candidates around it, weighted by their scores."""
    soft_nms: bool = False
    """Decay the scores of overlapping boxes instead of suppressing them (soft-NMS)."""

    __test__: ClassVar[bool] = False  # not a test class for pytest, despite its name

    def __post_init__(self) -> None:
        if any(side < 1 for side in self.scales):
            raise UserError(f"expected scales to be at least 1 pixel, but got {self.scales}")
        if len(set(self.scales)) < len(self.scales):
            raise UserError(f"expected scales to be distinct, but got {self.scales}")
        require_at_least(self, 1, "refine")
        require_at_most(self, _MOST_PIXELS, "scales")
        require_at_most(self, 100, "refine")


RECIPES = (
    DeepLabRecipe,
    RPNRecipe,
    ClassAwareRPNRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    ClassifierRecipe,
)
"""The recipe classes of all networks."""


def recipe_from_dict(values: Mapping[str, Any], *, source: str | Path) -> Recipe:
    """Returns the recipe with these fields; missing fields take their defaults.

    Args:
        values: as returned by `Recipe.to_dict` or `json.loads`.
        source: origin of the values, for error messages.
    Raises:
        UserError: if the network or a field is unknown or has an invalid value.
    """
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    network = fields.pop("network", None)
    recipe = next((known for known in RECIPES if known.network == network), None)
    if recipe is None:
        names = ", ".join(known.network for known in RECIPES)
        raise UserError(f"{source}: expected network to be one of {names}, but got {network!r}")
    known = [field.name for field in dataclasses.fields(recipe)]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise UserError(
            f"{source}: expected fields of a {network} recipe ({', '.join(known)}), "
            f"but got {unknown[0]!r}"
        )
    try:
        return recipe(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error


def published_weights(backbone: BackboneName) -> str | None:
    """The name of a backbone's published ImageNet weights, for `init`; None if there are none."""
    if backbone.startswith("timm/"):
        return "timm"
    return "IMAGENET1K_V1" if backbone.startswith("resnet") else None


def finetune(
    recipe: type[_RecipeT],
    *,
    images: int,
    short_side: int = 480,
    gpu: bool = True,
    batch: int | None = None,
    backbone: BackboneName = "resnet50",
    init: str | None = "IMAGENET1K_V1",
) -> _RecipeT:
    """Settings for fine-tuning on your own data: pretrained weights, a few hundred images or more.

    Trains for 40 passes over the images, but at least 1,000 and at most 30,000 iterations, with
    SGD, a cosine schedule, averaged weights, and color and scale jitter. Offset layers use a tenth
    of the learning rate, and gradients are clipped, so that sampling locations stay on the feature
    map. Batch norm is frozen because batches are small; with random weights, it is trained.

    Args:
        recipe: the network's class.
        images: number of training images.
        short_side: typical shorter side of the images, in pixels. Training images are resized to
            it, clamped to 160 to 480 (on a CPU, 160 to 240).
        gpu: whether to train on a GPU.
        batch: batch size; None uses the network's default, halved on a CPU.
        backbone: backbone network.
        init: initial weights of the backbone; None for random ones.
    """
    plain = recipe(backbone=backbone)
    if batch is None:
        batch = max(1, min(plain.batch, images) // (1 if gpu else 2))
    settings = dataclasses.replace(
        plain,
        init=init,
        norm="trained" if init is None else "frozen",
        batch=batch,
        iterations=min(30_000, max(1_000, math.ceil(40 * images / batch))),
        schedule="cosine",
        lr=(plain.lr if init is None else 0.01) * batch / plain.batch,
        warmup=100,
        offset_lr_scale=0.1,
        clip=10.0,
        ema=0.99,
    )
    return settings.fitted(min(480 if gpu else 240, max(160, short_side)))


def voc2012(*, deform_layers: DeformLayers = 3) -> DeepLabRecipe:
    """The paper's DeepLab on PASCAL VOC 2012 (section 4.1): 30k iterations, 360 px, batch 8."""
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
    """The paper's DeepLab on Cityscapes (section 4.1): 45k iterations, 1024 px, batch 8.

    The crop and the warmup are those of the authors' code; the paper does not mention them.
    """
    return dataclasses.replace(
        voc2012(deform_layers=deform_layers),
        short_side=1024,
        max_side=2048,
        crop=(768, 1024),
        iterations=45_000,
        warmup=1000,
    )


def imagenet(*, backbone: BackboneName) -> ClassifierRecipe:
    """The paper's pretraining on ImageNet (appendix B, Table 7), with the settings of its [22].

    He et al. 2016, "Deep residual learning for image recognition", section 3.4: 600k iterations,
    batch 256, shorter sides from 256 to 480, crops of 224; evaluation on the central crop at 256.
    They divide the learning rate by 10 when the error plateaus, here after each third. Their image
    sizes, color jitter, momentum and weight decay are the defaults.
    """
    return ClassifierRecipe(backbone=backbone, batch=256, iterations=600_000, lr=0.1, warmup=0)


def voc_detection(recipe: type[_Detector]) -> _Detector:
    """The paper's settings of a detector on PASCAL VOC (section 4.2), by the authors' conventions.

    30k iterations, 600 px, batch 8; backbone and batch norm as for segmentation. The warmup is that
    of the authors' code. `dataclasses.replace` turns it into a row of Table 1 or 3.
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


def _times(size: int | tuple[int, ...] | None, factor: float) -> int | tuple[int, ...] | None:
    """An image size, or several, multiplied by a factor."""
    if isinstance(size, tuple):
        return tuple(round(factor * side) for side in size)
    return None if size is None else round(factor * size)


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value has the type of a recipe field."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(v) and value == v for v in typing.get_args(hint))
    if origin is types.UnionType:
        return any(_is_a(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        return len(value) == len(parts) and all(map(_is_a, value, parts))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _describe(hint: Any) -> str:
    """The type of a recipe field in words."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    return str(hint) if typing.get_origin(hint) else hint.__name__
