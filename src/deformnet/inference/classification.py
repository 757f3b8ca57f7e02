"""Classes of images on disk or in memory, from a trained classifier."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors

from deformnet.data.transforms import classification_testing_transforms
from deformnet.inference.files import read_images
from deformnet.models.classifier import Classifier
from deformnet.recipes import ClassifierRecipe
from deformnet.runs import replacing

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
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.classes = classes
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self._prepare = classification_testing_transforms(
            short_side=recipe.test_short_side, crop=recipe.crop
        )

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
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}"
            )
        prepared = self._prepare(tv_tensors.Image(image))
        batch = prepared[None].to(self.device, memory_format=torch.channels_last)
        return self.model(batch).softmax(dim=1)[0].cpu()


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
