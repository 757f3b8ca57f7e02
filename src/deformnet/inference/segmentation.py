"""Label maps of images on disk or in memory, from a trained run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors

from deformnet._files import replacing
from deformnet.data.transforms import segmentation_evaluation_transforms
from deformnet.engine.runs import load_run
from deformnet.inference.files import read_images
from deformnet.inference.preparing import Prepared, choose_device, require_image
from deformnet.models.deeplab import DeepLab
from deformnet.recipes import DeepLabRecipe
from deformnet.visualization.drawing import label_image, overlay


class SegmentationPredictor:
    """A trained DeepLab that takes images of any size and gives label maps of that size.

    Args:
        recipe: says at which size the network sees the images.
        model: the network.
        classes: names of the labels.
        device: where to compute; None takes a GPU if there is one.
    """

    def __init__(
        self,
        recipe: DeepLabRecipe,
        model: DeepLab,
        classes: tuple[str, ...],
        device: torch.device | str | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.classes = classes
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self._transforms = segmentation_evaluation_transforms(
            short_side=recipe.short_side, max_side=recipe.max_side
        )

    @classmethod
    def from_run(cls, run: Path, device: torch.device | str | None = None) -> Self:
        """The predictor of a run folder; errors as `deformnet.engine.runs.load_run`."""
        recipe, model, trained_on = load_run(run)
        if not isinstance(recipe, DeepLabRecipe) or not isinstance(model, DeepLab):
            raise ValueError(f"{run}: wanted a run of deeplab, got one of {recipe.network}")
        return cls(recipe, model, trained_on.classes, device)

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """
        Args:
            image: uint8 [3, H, W], RGB.
        Returns:
            uint8 [H, W], on the CPU: the label of each pixel.
        Raises:
            ValueError: if it is not such an image.
        """
        prepared = self.prepare(image)
        return self.labels(self.model(prepared.input), (image.shape[1], image.shape[2]))

    def prepare(self, image: Tensor) -> Prepared:
        """What the model is called with for an image uint8 [3, H, W]; errors as of a call."""
        require_image(image)
        # The transforms are those of scoring, which come in pairs with a label map.
        nothing = tv_tensors.Mask(torch.zeros(image.shape[1:], dtype=torch.uint8))
        prepared, _ = self._transforms(tv_tensors.Image(image), nothing)
        batch = prepared[None].to(self.device, memory_format=torch.channels_last)
        return Prepared.whole(batch, image)

    def labels(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """The label map of an image of (height, width) `size`, uint8 [H, W], on the CPU.

        Args:
            logits: [1, C, h, w], what the model says of the prepared image.
        """
        # Class by class: all of them at the size of a large photograph would fill the memory.
        best = torch.full((1, 1, *size), -torch.inf, device=self.device)
        labels = torch.zeros(size, dtype=torch.uint8, device=self.device)
        for label in range(logits.shape[1]):
            plane = F.interpolate(
                logits[:, label : label + 1], size=size, mode="bilinear", align_corners=False
            )
            labels[(plane > best)[0, 0]] = label
            best = torch.maximum(best, plane)
        return labels.cpu()


def predict_files(
    predictor: SegmentationPredictor, images: Sequence[Path], out: Path
) -> Iterator[tuple[Path, str | None]]:
    """Segments image files one by one into a folder.

    For `photo.jpg` it writes `labels/photo.png`, a palette PNG of class indices of the size of the
    image, and `overlays/photo.jpg`, the image tinted by class with a legend.

    Args:
        images: files as `find_images` returns them.
        out: the folder.
    Yields:
        Each file as it is done, with None or with what was wrong with it.
    Raises:
        OSError: if a result cannot be written.
    """
    for path, image in read_images(images):
        if isinstance(image, str):
            yield path, image
            continue
        labels = predictor(image)
        with replacing(out / "labels" / f"{path.stem}.png") as file:
            label_image(labels, predictor.classes).save(file, format="PNG")
        with replacing(out / "overlays" / f"{path.stem}.jpg") as file:
            drawn = overlay(image, labels, predictor.classes)
            drawn.save(file, format="JPEG", quality=92, subsampling=0)
        yield path, None
