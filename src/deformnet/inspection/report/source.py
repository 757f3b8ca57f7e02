"""The images of a split, with what is in them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from deformnet.data import DetectionDataset, open_detection, open_segmentation
from deformnet.data.base import SegmentationDataset
from deformnet.inference import SegmentationPredictor
from deformnet.inspection.report.contents import Contents, object_classes, of_boxes, of_label_map
from deformnet.inspection.report.network import Predictor


class Source:
    """The images of a split, with what is in them."""

    def __init__(
        self,
        predictor: Predictor,
        run: Path,
        data: Path,
        split: str,
        limit: int | None,
        objects: Sequence[str],
    ) -> None:
        self.dataset: SegmentationDataset | DetectionDataset
        if isinstance(predictor, SegmentationPredictor):
            self.dataset = open_segmentation(data, split)
        else:
            self.dataset = open_detection(data, split)
            if not self.dataset.has_ground_truth:
                raise ValueError(f"{data}: the objects of {split} are not published")
        if self.dataset.classes != predictor.classes:
            raise ValueError(
                f"{data}: has the classes {', '.join(self.dataset.classes)}; "
                f"{run} was trained on {', '.join(predictor.classes)}"
            )
        unknown = [name for name in objects if name not in self.dataset.classes]
        if unknown:
            known = ", ".join(self.dataset.classes)
            raise ValueError(f"objects: wanted some of {known}, got {unknown[0]!r}")
        labelled = isinstance(self.dataset, SegmentationDataset)
        chosen = object_classes(self.dataset.classes) if labelled else self.dataset.classes
        self.objects = tuple(objects) or chosen
        if not self.objects:
            raise ValueError(f"{data}: no class is one of single things; name some by objects")
        self._count = len(self.dataset) if limit is None else min(limit, len(self.dataset))

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def __getitem__(self, index: int) -> tuple[Tensor, Contents]:
        image, truth = self.dataset[index]
        image = image.as_subclass(Tensor)
        if isinstance(truth, Tensor):
            labels = truth.as_subclass(Tensor)
            return image, of_label_map(labels, self.dataset.classes, self.objects)
        size = (image.shape[1], image.shape[2])
        return image, of_boxes(truth, self.dataset.classes, size)

    def contents(self, what: str) -> Iterator[tuple[Tensor, Contents]]:
        """All images in turn, with a progress bar."""
        for index in tqdm(range(len(self)), desc=what, disable=None):
            yield self[index]
