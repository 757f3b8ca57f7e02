"""Commands that use a trained network."""

import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from deformnet._errors import UserError
from deformnet.cli.errors import BAD_INPUT
from deformnet.cli.options import GROUP, RunPath
from deformnet.cli.scores import print_once, printing_unsaved
from deformnet.engine.settings import Hardware
from deformnet.recipes import TestTimeAugmentation

if TYPE_CHECKING:
    from deformnet.tasks.results import Written


def evaluate(
    run: RunPath,
    *,
    data: Path,
    split: str = "val",
    score_at: Literal["original", "network"] = "original",
    stored_proposals: tuple[Path, ...] = (),
    feature_cache: Path | None = None,
    augmentation: Annotated[TestTimeAugmentation, GROUP] = TestTimeAugmentation(),  # noqa: B008
    hardware: Annotated[Hardware, GROUP] = Hardware(),  # noqa: B008 (both are frozen)
) -> None:
    """Evaluate a trained network and write metrics-SPLIT.json to its run folder.

    Args:
        run: Run folder.
        data: Data set folder, as for training.
        split: Split to evaluate on.
        score_at: For DeepLab: compare at the original size of the label maps, or at the input size
            of the network, as the authors did on VOC.
        stored_proposals: Proposal files written by `deformnet propose`, for a detector that was
            trained on stored proposals.
        feature_cache: Folder to keep the features of a frozen backbone in, as in training.
        augmentation: For detectors: inference at several scales, flipped, with refined boxes.
    """
    from deformnet.engine import evaluate
    from deformnet.tasks import TaskOptions

    options = TaskOptions(score_at=score_at, augmentation=augmentation, proposals=stored_proposals)
    with printing_unsaved():
        result = evaluate(
            run, data, split, options=options, feature_cache=feature_cache, hardware=hardware
        )
        print_once(result)


def predict(
    run: RunPath,
    images: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")],
    *,
    out: Path,
    threshold: float = 0.5,
    box_format: Annotated[
        Literal["jsonl", "coco", "yolo", "csv"], tyro.conf.arg(name="format")
    ] = "jsonl",
    augmentation: Annotated[TestTimeAugmentation, GROUP] = TestTimeAugmentation(),  # noqa: B008
    device: str | None = None,
) -> None:
    """Segment images, detect objects in them, or classify them.

    DeepLab writes label maps to OUT/labels and overlays to OUT/overlays. Detectors write images
    with boxes to OUT/pictures and all boxes to OUT/detections.jsonl or, with --format, to another
    file. Classifiers write the five most probable classes of each image to OUT/predictions.jsonl.
    Images are named by their path relative to the given folder.

    Args:
        run: Run folder, or an exported network: a .safetensors, .onnx or .pt2 file, or
            hf://OWNER/REPO.
        images: Images, videos, folders (searched recursively), or patterns such as "photos/*.jpg".
        out: Folder for the results.
        threshold: For detectors: minimum score of the boxes to draw; the file contains all boxes.
        box_format: For detectors: format of the file with all boxes: detections.jsonl,
            detections.json (COCO), labels/IMAGE.txt (YOLO) or detections.csv.
        augmentation: For detectors: inference at several scales, flipped, with refined boxes.
        device: Device, such as cpu or cuda:1; None uses a GPU if there is one.
    """
    from tqdm import tqdm

    from deformnet.data.files import listing
    from deformnet.engine import load
    from deformnet.tasks import TaskOptions, find_images

    if not images:
        raise UserError("expected at least one image file or folder, but got none")
    files = find_images(images, videos=True, apart_from=out)
    predictor = load(run, options=TaskOptions(augmentation=augmentation), device=device)
    results = predictor.write(files, out, threshold=threshold, box_format=box_format)
    total = None if any(file.is_video for file in files) else len(files)
    done: list[Written] = []
    with tqdm(results, total=total, disable=None) as bar:
        for result in bar:
            done.append(result)
            if result.problem is not None:
                bar.write(f"deformnet: {result.problem}", file=sys.stderr)
    failed = [result.name for result in done if result.problem is not None]
    print(f"{len(done) - len(failed)} of {len(done)} images done, results in {out}")
    if predictor.has_boxes and len(failed) < len(done):
        print(_boxes_line(done, threshold))
    if failed:
        print(f"failed: {listing(failed)}")
        raise SystemExit(BAD_INPUT)


def _boxes_line(done: Sequence["Written"], threshold: float) -> str:
    """The number of boxes drawn or, if there are none, the highest score."""
    boxes, images = sum(one.boxes for one in done), sum(one.boxes > 0 for one in done)
    if boxes:
        return f"{boxes} boxes with a score of at least {threshold:g}, in {images} images"
    none = f"no boxes drawn: none has a score of at least {threshold:g}"
    name, best = max(((one.name, one.best or 0.0) for one in done), key=itemgetter(1))
    if best == 0:
        return f"{none}; the network predicted no boxes"
    return f"{none}; the highest score is {best:.3f}, in {name}: try a lower --threshold"


def propose(
    run: RunPath,
    *,
    data: Path,
    out: Path,
    split: str = "train",
    hardware: Annotated[Hardware, GROUP] = Hardware(),  # noqa: B008 (frozen)
) -> None:
    """Write the proposals of a trained detector, for training other detectors.

    Args:
        run: Run folder or exported network of `train rpn` or of another detector.
        data: Data set folder in VOC or COCO layout.
        out: File to write.
        split: Split to write proposals for.
    """
    from deformnet.engine import propose

    count = propose(run, data, split, out, hardware=hardware)
    print_once(f"proposals for {count} images in {out}")
