"""What one browser looks at: an image, a point in it, and what the networks did with it."""

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deformnet.data import BoxAnnotations
from deformnet.inference import draw_boxes, overlay
from deformnet.models.detection.detector import Detections
from deformnet.inspection.viewer.images import Images, Known, open_image
from deformnet.inspection.viewer.networks import FilterRow, Look, Network, Point, Sampling
from deformnet.inspection.viewer.pictures import (
    Frame,
    backdrop,
    draw_bins,
    draw_boxes_around,
    draw_sampling,
    draw_seen,
    outside,
    shrink,
)

_KEPT = 4  # images of a browser whose runs are kept
_BEST = 5  # classes of an image that are named


class Controls(NamedTuple):
    """What is set on the page.

    Attributes:
        plain: show the plain twin.
        depth: layers to follow the samples through.
        bins: of a detector: a click shows a detection's bins, and not sampling locations.
        least_score: detections that score less are not shown.
    """

    plain: bool
    depth: int
    bins: bool
    least_score: float


class Shown:
    """An image on the page. Its runs are made when they are asked for, once for each network."""

    def __init__(self, name: str, known: Known) -> None:
        self.name = name
        self.frame = Frame.around((known.image.shape[1], known.image.shape[2]))
        self.inner = shrink(known.image, self.frame)
        self.backdrop = backdrop(self.inner, self.frame)
        self.truth = known.truth
        self.flat_width = self.inner.width
        """Of the pictures without a margin; narrow ones are enlarged."""
        self._image = known.image
        self._looks: dict[Network, Look] = {}

    def look(self, network: Network) -> Look:
        if network not in self._looks:
            self._looks[network] = network.look(self._image)
        return self._looks[network]

    def pixels(self) -> Tensor:
        """The image as it is shown, uint8 [3, h, w]."""
        return torch.from_numpy(np.array(self.inner)).permute(2, 0, 1)


class Session:
    """What one browser looks at.

    Args:
        images: to choose from.
        network: with deformable layers.
        twin: its plain twin, or None.
    """

    def __init__(self, images: Images | None, network: Network, twin: Network | None) -> None:
        self._images = images
        self._network = network
        self._twin = twin
        self._kept: OrderedDict[int, Shown] = OrderedDict()
        self.shown: Shown | None = None
        self.point: Point | None = None

    def choose(self, index: int) -> None:
        """Shows one of the given images.

        Raises:
            ValueError, OSError: one line, if it cannot be read; what was shown before stays.
        """
        assert self._images is not None
        if index not in self._kept:
            shown = Shown(self._images.names[index], self._images.load(index))
            shown.look(self._network)  # a failure leaves the page as it is
            self._kept[index] = shown
        self._kept.move_to_end(index)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        self.shown, self.point = self._kept[index], None

    def upload(self, path: Path) -> None:
        """Shows an image that was sent; errors as `choose`. It is kept until the next one."""
        shown = Shown(path.name, Known(open_image(path)))
        shown.look(self._network)
        self.shown, self.point = shown, None

    def click(self, pixel: tuple[int, int]) -> None:
        """Takes the point at a pixel (y, x) of the picture; from the margin, the nearest one."""
        assert self.shown is not None
        self._take(self.shown.frame.to_image(pixel))

    def click_flat(self, pixel: tuple[int, int]) -> None:
        """The same for the picture of the prediction or of the truth, which has no margin."""
        assert self.shown is not None
        scale = self.shown.flat_width / self.shown.frame.size[1]
        y, x = ((place + 0.5) / scale - 0.5 for place in pixel)
        self._take((y, x))

    def _take(self, point: Point) -> None:
        assert self.shown is not None
        height, width = self.shown.frame.size
        self.point = min(max(point[0], 0), height - 1), min(max(point[1], 0), width - 1)

    def look(self, controls: Controls) -> Look | None:
        """What the chosen network did with the image."""
        if self.shown is None:
            return None
        return self.shown.look(self.network(controls))

    def network(self, controls: Controls) -> Network:
        return self._twin if controls.plain and self._twin is not None else self._network

    def depth(self, controls: Controls) -> int:
        """Layers that are followed: as many as are wanted, if the chosen network has them."""
        return min(controls.depth, self.network(controls).depths)

    def sampling(self, controls: Controls) -> Sampling | None:
        """What is sampled from the clicked point."""
        look = self.look(controls)
        if look is None or self.point is None:
            return None
        return look.sampling(self.point, self.depth(controls))

    def filters(self, controls: Controls) -> list[FilterRow]:
        """The deformable layers at the clicked point."""
        look = self.look(controls)
        return [] if look is None or self.point is None else look.filters(self.point)

    def beyond(self, sampling: Sampling) -> int:
        """How many samples of the lowest map are not on the picture."""
        return 0 if self.shown is None else outside(self.shown.frame, sampling)

    def detection(self, controls: Controls) -> int | None:
        """The detection that was clicked."""
        look = self.look(controls)
        if look is None or self.point is None:
            return None
        return look.detection_at(self.point, controls.least_score)

    def picture(self, controls: Controls) -> Image.Image | None:
        """The picture to click, with what the last click asked for."""
        look = self.look(controls)
        if look is None or self.shown is None:
            return None
        frame, picture = self.shown.frame, self.shown.backdrop
        height, width = frame.size
        if look.frame != (0, 0, width, height):
            picture = draw_seen(picture, frame, look.frame)
        if isinstance(look.found, Detections):
            enough = look.found.scores >= controls.least_score
            picture = draw_boxes_around(picture, frame, look.found.boxes[enough])
        if controls.bins:
            chosen = self.detection(controls)
            if chosen is None or look.bins is None:
                return picture
            assert isinstance(look.found, Detections)
            plain, moved = (bins[chosen] for bins in look.bins)
            what = self.what(look.found, chosen)
            return draw_bins(picture, frame, look.found.boxes[chosen], what, plain, moved)
        sampling = self.sampling(controls)
        return picture if sampling is None else draw_sampling(picture, frame, sampling)

    def what(self, found: Detections, index: int) -> str:
        """Class and score of a detection."""
        return f"{self._network.classes[int(found.labels[index])]} {found.scores[index]:.2f}"

    def prediction(self, controls: Controls) -> Image.Image | None:
        """The image tinted by predicted class, or with boxes; None for a classifier."""
        look = self.look(controls)
        if look is None or self.shown is None:
            return None
        if isinstance(look.found, Detections):
            enough = look.found.scores >= controls.least_score
            boxes, scores, labels = (values[enough] for values in look.found)
            return self._boxes(boxes, labels, scores)
        return self._tinted(look.found) if look.found.ndim == 2 else None

    def truth(self) -> Image.Image | None:
        """The same for what is known of the image."""
        truth = None if self.shown is None else self.shown.truth
        if isinstance(truth, BoxAnnotations):
            return self._boxes(truth.boxes.as_subclass(Tensor), truth.labels, None)
        return self._tinted(truth) if isinstance(truth, Tensor) else None

    def best_classes(self, controls: Controls) -> list[tuple[str, float]]:
        """Of a classifier: the most probable classes."""
        look = self.look(controls)
        if look is None or isinstance(look.found, Detections) or look.found.ndim != 1:
            return []
        best = look.found.topk(min(_BEST, len(look.found)))
        return [
            (self._network.classes[label], probability)
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def true_class(self) -> str | None:
        """Of an image that is sorted by class: its class."""
        truth = None if self.shown is None else self.shown.truth
        return self._network.classes[truth] if isinstance(truth, int) else None

    def _tinted(self, labels: Tensor) -> Image.Image:
        assert self.shown is not None
        height, width = self.shown.frame.inner
        small = Image.fromarray(labels.as_subclass(Tensor).numpy()).resize(
            (width, height), Image.Resampling.NEAREST
        )
        drawn = overlay(
            self.shown.pixels(), torch.from_numpy(np.array(small)), self._network.classes
        )
        self.shown.flat_width = drawn.width
        return drawn

    def _boxes(self, boxes: Tensor, labels: Tensor, scores: Tensor | None) -> Image.Image:
        assert self.shown is not None
        scale = torch.tensor([*reversed(self.shown.frame.scale)] * 2)
        drawn = draw_boxes(
            self.shown.pixels(), boxes * scale, labels, self._network.classes, scores
        )
        self.shown.flat_width = drawn.width
        return drawn
