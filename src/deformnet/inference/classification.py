"""Classes of images on disk or in memory, from a trained classifier."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors

from deformnet._files import replacing
from deformnet.data.transforms import Resize, classification_evaluation_transforms
from deformnet.inference.files import read_images
from deformnet.inference.preparing import Prepared, choose_device, require_image
from deformnet.models.classifier import Classifier
from deformnet.recipes import ClassifierRecipe

_BEST = 5  # classes of an image that are written


class ClassificationPredictor:
    """A trained classifier that takes images of any size and gives the probability of each class.

    Args:
        recipe: says how large the network sees the images.
        model: the network.
        classes: names of the labels.
        device: where to compute; None takes a GPU if there is one.
    """

    def __init__(
        self,
        recipe: ClassifierRecipe,
        model: Classifier,
        classes: tuple[str, ...],
        device: torch.device | str | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.classes = classes
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self._transforms = classification_evaluation_transforms(
            short_side=recipe.test_short_side, crop=recipe.crop
        )
        self._resize = Resize(recipe.test_short_side, None)

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """
        Args:
            image: uint8 [3, H, W], RGB; the network sees the square in its middle.
        Returns:
            [C], on the CPU: the probability of each class.
        Raises:
            ValueError: if it is not such an image.
        """
        return self.model(self.prepare(image).input).softmax(dim=1)[0].cpu()

    def prepare(self, image: Tensor) -> Prepared:
        """What the model is called with for an image uint8 [3, H, W]; errors as of a call."""
        require_image(image)
        seen = self._transforms(tv_tensors.Image(image))
        batch = seen[None].to(self.device, memory_format=torch.channels_last)
        size, resized = image.shape[1:], self._resize.size(*image.shape[1:])
        scale = (resized[0] / size[0], resized[1] / size[1])
        # As torchvision's CenterCrop rounds.
        corner = (round((resized[0] - seen.shape[1]) / 2), round((resized[1] - seen.shape[2]) / 2))
        return Prepared(batch, scale, corner)


def predict_classes(
    predictor: ClassificationPredictor, images: Sequence[Path], out: Path
) -> Iterator[tuple[Path, str | None]]:
    """Classifies image files, one after another, into a file of a folder.

    It writes `predictions.jsonl`, a line for each image that could be read, with the five most
    probable classes, best first:

        {"image": "photo.jpg", "classes": [{"class": "star", "probability": 0.93}, ...]}

    The lines get their name when all images are done: until then, and if the prediction is broken
    off, an older file stays.

    Args:
        images: files as `find_images` returns them.
        out: the folder.
    Yields:
        Each file as it is done, with None or with what was wrong with it.
    Raises:
        OSError: if the results cannot be written.
    """
    with replacing(out / "predictions.jsonl") as lines:
        for path, image in read_images(images):
            if isinstance(image, str):
                yield path, image
                continue
            best = predictor(image).topk(min(_BEST, len(predictor.classes)))
            classes = [
                {"class": predictor.classes[label], "probability": round(probability, 6)}
                for probability, label in zip(
                    best.values.tolist(), best.indices.tolist(), strict=True
                )
            ]
            line = json.dumps({"image": path.name, "classes": classes}, ensure_ascii=False)
            lines.write(f"{line}\n".encode())
            yield path, None
