"""The images that are analyzed, with their contents."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from deformnet._errors import UserError
from deformnet.inspection.runs import OpenedRun
from deformnet.inspection.settings import Analysis
from deformnet.tasks.annotations import Contents


class AnalyzedImages:
    """The images of a split that a run is analyzed on, with their contents.

    Raises:
        FileNotFoundError, UserError: if the data are missing, have other classes than the run or
            no objects, or lack one of `objects`.
    """

    def __init__(self, run: OpenedRun, data: Path, analysis: Analysis) -> None:
        self.annotated = run.task.annotated(data, analysis.split, run.data)
        classes = self.annotated.classes
        unknown = [name for name in analysis.objects if name not in classes]
        if unknown:
            raise UserError(
                f"expected objects to be classes of {data} ({', '.join(classes)}), but got "
                f"{unknown[0]!r}"
            )
        self.objects = tuple(analysis.objects) or self.annotated.countable
        if not self.objects:
            raise UserError(f"{data}: no countable classes found; pass --objects")
        self._count = min(analysis.images or len(self.annotated), len(self.annotated))

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return self.annotated.names[index]

    def __getitem__(self, index: int) -> tuple[Tensor, Contents]:
        image, annotation = self.annotated[index]
        return image, annotation.contents(self.objects)

    def contents(self, description: str) -> Iterator[tuple[Tensor, Contents]]:
        """Yield all images with their contents, with a progress bar."""
        for index in tqdm(range(len(self)), desc=description, disable=None):
            yield self[index]
