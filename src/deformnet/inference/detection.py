"""Boxes around the objects of images on disk or in memory, from a trained detector.

Dai et al. 2017, section 4.3 and Table 5: testing at several sizes, and iterative averaging of boxes
(Gidaris and Komodakis 2015, "Object detection via a multi-region and semantic segmentation-aware
CNN model", section 5).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import v2

from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Resize
from deformnet.metrics.detections import Record, to_line
from deformnet.visualization.drawing import draw_boxes
from deformnet.inference.files import read_images
from deformnet.inference.preparing import Prepared, choose_device, require_image
from deformnet.models.detection.detector import Candidates, Detections, Detector, Features, Proposals, Size
from deformnet.models.detection.postprocess import merge, postprocess
from deformnet.recipes import TestTimeAugmentation
from deformnet._files import replacing

_BOXES_AT_ONCE = 1000  # pooled features of so many boxes are in memory; refinement asks for more


class DetectionPredictor:
    """A trained detector that takes images of any size and gives boxes in their pixels.

    Args:
        model: the network.
        classes: names of its labels, without a background.
        short_side: shorter side of the images, in pixels, that the network was trained for.
        max_side: bound on the longer side, which wins over `short_side`; None for no bound. At
            another shorter side it grows or shrinks in proportion.
        score_threshold: what scores no more is not reported.
        nms: a box is dropped if its IoU with a better one of its class exceeds this.
        max_detections: how many boxes of an image are reported at most.
        testing: several sizes, mirrored images, refined and averaged boxes.
        device: where to compute; None takes a GPU if there is one.
    Raises:
        ValueError: if the model has another number of classes, or if `testing` feeds boxes back to
            a model that takes none.
    """

    def __init__(
        self,
        model: Detector,
        classes: Sequence[str],
        *,
        short_side: int,
        max_side: int | None,
        score_threshold: float = 1e-3,
        nms: float = 0.3,
        max_detections: int = 300,
        testing: TestTimeAugmentation = TestTimeAugmentation(),
        device: torch.device | str | None = None,
    ) -> None:
        if len(classes) != model.num_classes:
            raise ValueError(
                f"classes must name the model's {model.num_classes} classes, got {len(classes)}"
            )
        if testing.refine > 1 and not model.takes_proposals:
            raise ValueError(
                f"refine must be 1 for {type(model).__name__}, which takes no boxes to refine, "
                f"got {testing.refine}"
            )
        self.device = choose_device(device)
        self.classes = tuple(classes)
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self.score_threshold = score_threshold
        self.nms = nms
        self.max_detections = max_detections
        self.testing = testing
        self._usual = _preparation(short_side, max_side)
        self._views = [
            _preparation(side, None if max_side is None else round(side * max_side / short_side))
            for side in testing.scales or (short_side,)
        ]

    @torch.inference_mode()
    def __call__(self, image: Tensor, proposals: Tensor | None = None) -> Detections:
        """
        Args:
            image: uint8 [3, H, W], RGB.
            proposals: boxes [P, 4] in pixels of `image` that take the place of the network's own
                proposals; parts of them outside the image are cut off.
        Returns:
            What is in the image, best first, on the CPU; boxes in pixels of `image`.
        Raises:
            ValueError: if it is not such an image, if `proposals` are no such boxes or not finite,
                or if the model takes none.
        """
        require_image(image)
        size = (image.shape[1], image.shape[2])
        if proposals is not None:
            proposals = self._checked(proposals, size)
        found: list[Candidates] = []
        for prepare in self._views:
            upright = self._input(prepare, image)
            for mirrored in (False, True) if self.testing.flip else (False,):
                seen = upright.flip(3) if mirrored else upright
                seen_size = (seen.shape[2], seen.shape[3])
                given = None
                if proposals is not None:
                    given = _rescaled(proposals, size, seen_size)
                    given = _mirrored(given, seen_size) if mirrored else given
                for boxes, scores in self._look(self.model.features(seen), seen_size, given):
                    there = _mirrored(boxes, seen_size) if mirrored else boxes
                    found.append(Candidates(_rescaled(there, seen_size, size), scores))
        return self._report(found)

    def prepare(self, image: Tensor) -> Prepared:
        """An image uint8 [3, H, W] at the size of training; errors as of a call."""
        require_image(image)
        return Prepared.whole(self._input(self._usual, image), image)

    def detect(self, features: Features, seen: Size, size: Size) -> Detections:
        """What is found in a single look whose features are known; on the CPU.

        Args:
            features: what the model makes of a prepared image.
            seen: height and width of that.
            size: of the image itself, in whose pixels the boxes are.
        """
        looks = self._look(features, seen, None)
        return self._report(
            [Candidates(_rescaled(it.boxes, seen, size), it.scores) for it in looks]
        )

    def _report(self, found: list[Candidates]) -> Detections:
        """What is left of all candidates of an image."""
        # Mixed precision would average the corners of boxes to within several pixels.
        with torch.autocast(self.device.type, enabled=False):
            detections = postprocess(
                merge(found),
                score_threshold=self.score_threshold,
                nms=self.nms,
                max_detections=self.max_detections,
                soft_nms=self.testing.soft_nms,
                box_averaging=self.testing.box_averaging,
            )
        return Detections(*(values.cpu() for values in detections))

    @torch.inference_mode()
    def propose(self, image: Tensor) -> Proposals:
        """The boxes that the network would look into, for other networks to be trained on.

        From a single look at the size of training, whatever `testing` says.

        Args:
            image: uint8 [3, H, W], RGB.
        Returns:
            Boxes in pixels of `image` and their scores, best first, on the CPU.
        Raises:
            ValueError: if it is not such an image.
        """
        prepared = self.prepare(image)
        seen, size = prepared.input, prepared.size
        boxes, scores = self.model.propose(self.model.features(seen), [size])[0]
        boxes = _rescaled(boxes.float(), size, (image.shape[1], image.shape[2]))
        return Proposals(boxes.cpu(), scores.float().cpu())

    def _input(self, prepare: v2.Compose, image: Tensor) -> Tensor:
        """The network's input [1, 3, h, w]; resized where the image is, as in training."""
        return prepare(image)[None].to(self.device, memory_format=torch.channels_last)

    def _checked(self, proposals: Tensor, size: Size) -> Tensor:
        """Stored proposals as the model takes them, still in pixels of the image."""
        if not self.model.takes_proposals:
            raise ValueError(f"proposals: {type(self.model).__name__} takes none from outside")
        if proposals.ndim != 2 or proposals.shape[1] != 4 or not proposals.is_floating_point():
            raise ValueError(
                "proposals must be floating-point [P, 4], "
                f"got {proposals.dtype} {list(proposals.shape)}"
            )
        if not proposals.isfinite().all():
            raise ValueError("proposals must be finite, got NaN or infinity")
        return clip_boxes_to_image(proposals.to(self.device, torch.float32), size)

    def _look(self, features: Features, size: Size, proposals: Tensor | None) -> list[Candidates]:
        """What each pass through the detector finds, in pixels of the network's input.

        As Gidaris and Komodakis do it: the boxes of a pass are the proposals of the next, and where
        every class has its own box, the box is scored again for that class alone. Boxes that no
        longer score enough to be reported are not followed further.
        """
        if not self.model.takes_proposals:
            return [self._candidates(features, size, features.last.new_zeros(0, 4))]
        if proposals is None:
            proposals = self.model.propose(features, [size])[0].boxes
        passes = [self._candidates(features, size, proposals)]
        for _ in range(self.testing.refine - 1):
            boxes, scores = passes[-1]
            followed = scores > self.score_threshold
            if boxes.ndim == 2:
                followed = followed.any(dim=1) & boxes.isfinite().all(dim=-1)
                passes.append(self._candidates(features, size, boxes[followed]))
            else:
                rows, labels = (followed & boxes.isfinite().all(dim=-1)).nonzero(as_tuple=True)
                again = self._candidates(features, size, boxes[rows, labels])
                own = F.one_hot(labels, scores.shape[1]).bool()
                passes.append(Candidates(again.boxes, again.scores.where(own, 0.0)))
        return passes

    def _candidates(self, features: Features, size: Size, proposals: Tensor) -> Candidates:
        """The model's candidates of one image in float32, a limited number of boxes at a time."""
        parts = [
            self.model.candidates(features, [size], [some])[0]
            for some in proposals.split(_BOXES_AT_ONCE)
        ]
        return Candidates(*(values.float() for values in merge(parts)))


def predict_detections(
    predictor: DetectionPredictor, images: Sequence[Path], out: Path, *, threshold: float = 0.5
) -> Iterator[tuple[Path, str | None]]:
    """Finds the objects in image files, one file after another, into a folder.

    It writes `detections.jsonl`, a line for each image that could be read, with everything that
    the predictor reports (see `deformnet.metrics.detections`); and for `photo.jpg` the picture
    `pictures/photo.jpg` with boxes around what scores most. The lines get their name when all
    images are done: until then, and if the prediction is broken off, an older file stays.

    Args:
        images: files as `find_images` returns them.
        out: the folder.
        threshold: what scores less is not drawn.
    Yields:
        Each file as it is done, with None or with what was wrong with it.
    Raises:
        OSError: if a result cannot be written.
    """
    with replacing(out / "detections.jsonl") as lines:
        for path, image in read_images(images):
            if isinstance(image, str):
                yield path, image
                continue
            boxes, scores, labels = predictor(image)
            names = [predictor.classes[label] for label in labels.tolist()]
            line = to_line(Record(path.stem, boxes, scores, names))
            lines.write(f"{line}\n".encode())
            shown = scores >= threshold
            drawn = draw_boxes(image, boxes[shown], labels[shown], predictor.classes, scores[shown])
            with replacing(out / "pictures" / f"{path.stem}.jpg") as file:
                drawn.save(file, format="JPEG", quality=92, subsampling=0)
            yield path, None


def _preparation(short_side: int, max_side: int | None) -> v2.Compose:
    """The transforms of training, for an image alone."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    normalise = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return v2.Compose([Resize(short_side, max_side), to_float, normalise])


def _mirrored(boxes: Tensor, size: Size) -> Tensor:
    """Boxes [..., 4] in an image of this height and width, as they lie in its mirror image."""
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    return torch.stack([size[1] - x2, y1, size[1] - x1, y2], dim=-1)


def _rescaled(boxes: Tensor, size: Size, new_size: Size) -> Tensor:
    """Boxes [..., 4] in an image of height and width `size`, after its resizing to `new_size`."""
    (height, width), (new_height, new_width) = size, new_size
    # First times, then divided by: so the image's own edges stay its edges to the last bit.
    return (
        boxes
        * boxes.new_tensor([new_width, new_height] * 2)
        / boxes.new_tensor([width, height] * 2)
    )
