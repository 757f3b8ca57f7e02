"""The state of one browser tab: an image, a point in it, and the forward passes over it."""

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from deformnet._errors import UserError
from deformnet.inspection.runs import OpenedRun
from deformnet.inspection.viewer import pictures, recording
from deformnet.inspection.viewer.images import Images, Sample, open_image
from deformnet.inspection.viewer.recording import FilterRow, ForwardPass, Point, UnitSamples
from deformnet.tasks.annotations import Annotation
from deformnet.tasks.results import problem

_KEPT = 4  # images per browser tab whose passes are kept
_BEST = 5  # classes of an image that are named


class Controls(NamedTuple):
    """Settings of the controls.

    Attributes:
        baseline: show the baseline.
        depth: layers to follow samples through.
        bins: a click shows the bins of a detection, not sampling locations.
        least_score: minimum score of detections to show.
    """

    baseline: bool
    depth: int
    bins: bool
    least_score: float


class Shown:
    """An image on the page. Each network runs on it once, when it is needed."""

    def __init__(self, name: str, sample: Sample) -> None:
        self.name = name
        self.frame = pictures.Frame.around((sample.image.shape[1], sample.image.shape[2]))
        self.inner = pictures.shrink(sample.image, self.frame)
        self.backdrop = pictures.backdrop(self.inner, self.frame)
        self.ground_truth = sample.ground_truth
        self.flat_width = self.inner.width
        """Width of the pictures without a margin; narrow ones are enlarged."""
        self._image = sample.image
        self._passes: dict[OpenedRun, ForwardPass] = {}

    def forward(self, run: OpenedRun) -> ForwardPass:
        if run not in self._passes:
            self._passes[run] = recording.record_pass(run, self._image)
        return self._passes[run]

    def draw(self, annotation: Annotation) -> Image.Image | None:
        """Draw an annotation over the image without its margin."""
        pixels = torch.from_numpy(np.array(self.inner)).permute(2, 0, 1)
        drawn = annotation.draw(pixels)
        if drawn is not None:
            self.flat_width = drawn.width
        return drawn


class Session:
    """The state of one browser tab."""

    def __init__(self, images: Images | None, run: OpenedRun, baseline: OpenedRun | None) -> None:
        self._images = images
        self._run = run
        self._baseline = baseline
        self._kept: OrderedDict[int, Shown] = OrderedDict()
        self.shown: Shown | None = None
        self.point: Point | None = None

    def choose(self, index: int) -> None:
        """Show one of the offered images.

        Raises:
            UserError, OSError: one line, if it cannot be read; the shown image stays.
        """
        assert self._images is not None
        if index not in self._kept:
            self._kept[index] = self._opened(self._images.names[index], self._images.load(index))
        self._kept.move_to_end(index)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        self.shown, self.point = self._kept[index], None

    def upload(self, path: Path) -> None:
        """Show an uploaded image, which is kept until the next one; raises as `choose`."""
        self.shown, self.point = self._opened(path.name, Sample(open_image(path))), None

    def _opened(self, name: str, sample: Sample) -> Shown:
        shown = Shown(name, sample)
        try:
            shown.forward(self._run)  # a failure leaves the page as it is
        except (UserError, RuntimeError, MemoryError) as error:
            if (text := problem(Path(name), error)) is None:
                raise
            raise UserError(text) from error
        return shown

    def click(self, pixel: tuple[int, int], *, margin: bool) -> None:
        """Select the point at a pixel (y, x) of a picture; in the margin, the nearest point.

        Args:
            margin: whether the picture has a margin; those of prediction and ground truth do not.
        """
        assert self.shown is not None
        frame = self.shown.frame
        if margin:
            y, x = frame.to_image(pixel)
        else:
            scale = self.shown.flat_width / frame.size[1]
            y, x = ((place + 0.5) / scale - 0.5 for place in pixel)
        height, width = frame.size
        self.point = min(max(y, 0), height - 1), min(max(x, 0), width - 1)

    def run(self, controls: Controls) -> OpenedRun:
        """Return the run that the controls select."""
        return self._baseline if controls.baseline and self._baseline is not None else self._run

    def depth(self, controls: Controls) -> int:
        """Return the number of layers to follow: as set, if the network has as many."""
        return min(controls.depth, recording.depth_limit(self.run(controls)))

    def forward(self, controls: Controls) -> ForwardPass | None:
        """Return the forward pass of the selected network."""
        return None if self.shown is None else self.shown.forward(self.run(controls))

    def samples(self, controls: Controls) -> UnitSamples | None:
        """Return the sampling locations of the selected point."""
        done = self.forward(controls)
        if done is None or self.point is None:
            return None
        return done.samples(self.point, self.depth(controls))

    def filters(self, controls: Controls) -> list[FilterRow]:
        """Return the deformable layers at the selected point."""
        done = self.forward(controls)
        return [] if done is None or self.point is None else done.filters(self.point)

    def beyond(self, samples: UnitSamples) -> int:
        """Return the number of samples in the lowest map that lie beyond the picture."""
        return 0 if self.shown is None else pictures.outside(self.shown.frame, samples)

    def detection(self, controls: Controls) -> int | None:
        """Return the index of the selected detection."""
        done = self.forward(controls)
        if done is None or self.point is None:
            return None
        return done.detection_at(self.point, controls.least_score)

    def picture(self, controls: Controls) -> Image.Image | None:
        """Draw the picture to click, with the samples or bins of the selected point."""
        done = self.forward(controls)
        if done is None or self.shown is None:
            return None
        frame, picture = self.shown.frame, self.shown.backdrop
        height, width = frame.size
        if done.frame != (0, 0, width, height):
            picture = pictures.draw_seen(picture, frame, done.frame)
        picture = pictures.draw_boxes_around(
            picture, frame, done.prediction.best(least_score=controls.least_score).boxes
        )
        if not controls.bins:
            samples = self.samples(controls)
            return picture if samples is None else pictures.draw_samples(picture, frame, samples)
        index = self.detection(controls)
        if index is None or done.bins is None:
            return picture
        regular, moved = (bins[index] for bins in done.bins)
        box, caption = done.prediction.boxes[index], done.prediction.captions()[index]
        return pictures.draw_bins(picture, frame, box, caption, regular, moved)

    def prediction(self, controls: Controls) -> Image.Image | None:
        """Draw the prediction; None if it has no picture."""
        done = self.forward(controls)
        if done is None or self.shown is None:
            return None
        return self.shown.draw(done.prediction.best(least_score=controls.least_score))

    def ground_truth(self) -> Image.Image | None:
        """Draw the ground truth; None if it has no picture."""
        if self.shown is None or self.shown.ground_truth is None:
            return None
        return self.shown.draw(self.shown.ground_truth)

    def best_classes(self, controls: Controls) -> list[tuple[str, float]]:
        """Return the most probable classes, predicted by a classifier."""
        done = self.forward(controls)
        return [] if done is None else done.prediction.ranking(_BEST)

    def true_class(self) -> str | None:
        """Return the class of the image, if it is known."""
        known = None if self.shown is None else self.shown.ground_truth
        return None if known is None else known.label
