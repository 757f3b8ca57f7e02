"""Commands that use a trained network."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from deformnet._errors import UserError
from deformnet.cli.errors import BAD_INPUT
from deformnet.cli.options import GROUP, RunPath
from deformnet.cli.scores import print_once
from deformnet.engine.settings import Hardware
from deformnet.recipes import TestTimeAugmentation


def evaluate(
    run: RunPath,
    *,
    data: Path,
    split: str = "val",
    score_at: Literal["original", "network"] = "original",
    stored_proposals: tuple[Path, ...] = (),
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
        augmentation: For detectors: inference at several scales, flipped, with refined boxes.
    """
    from deformnet.engine import evaluate
    from deformnet.tasks import TaskOptions

    if run.is_file():
        raise UserError(f"{run}: expected a run folder to write the scores to, but got a file")
    options = TaskOptions(score_at=score_at, augmentation=augmentation, proposals=stored_proposals)
    print_once(evaluate(run, data, split, options=options, hardware=hardware))


def predict(
    run: RunPath,
    images: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")],
    *,
    out: Path,
    threshold: float = 0.5,
    augmentation: Annotated[TestTimeAugmentation, GROUP] = TestTimeAugmentation(),  # noqa: B008
    device: str | None = None,
) -> None:
    """Segment images, detect objects in them, or classify them.

    DeepLab writes label maps to OUT/labels and overlays to OUT/overlays. Detectors write images
    with boxes to OUT/pictures and all boxes to OUT/detections.jsonl. Classifiers write the five
    most probable classes of each image to OUT/predictions.jsonl.

    Args:
        run: Run folder, or .safetensors file of an exported network.
        images: Image files, or folders of images.
        out: Folder for the results.
        threshold: For detectors: minimum score of the boxes to draw; the file contains all boxes.
        augmentation: For detectors: inference at several scales, flipped, with refined boxes.
        device: Device, such as cpu or cuda:1; None uses a GPU if there is one.
    """
    from tqdm import tqdm

    from deformnet.engine import load
    from deformnet.tasks import TaskOptions, find_images

    if not images:
        raise UserError("expected at least one image file or folder, but got none")
    files = find_images(images)
    predictor = load(run, options=TaskOptions(augmentation=augmentation), device=device)
    failures = 0
    results = predictor.write(files, out, threshold=threshold)
    with tqdm(results, total=len(files), disable=None) as bar:
        for _, problem in bar:
            if problem is not None:
                failures += 1
                bar.write(f"deformnet: {problem}", file=sys.stderr)
    print(f"{len(files) - failures} of {len(files)} images done, results in {out}")
    if failures:
        raise SystemExit(BAD_INPUT)


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
        run: Run folder of `train rpn` or of another detector.
        data: Data set folder in VOC or COCO layout.
        out: File to write.
        split: Split to write proposals for.
    """
    from deformnet.engine import propose

    count = propose(run, data, split, out, hardware=hardware)
    print_once(f"proposals for {count} images in {out}")
