"""Makes images, trains a plain and a deformable network on them, compares the two; and a detector.

```
OUT/
  index.html                the page: the table and the pictures
  metrics.json              the numbers of the table, and what they were made with
  overview.png, predictions.png, sampling.png, parts.png
  data/                     the made images, in the VOC layout
  runs/plain, runs/deformable, runs/detector
```
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from deformnet._files import write_json
from deformnet.data.synthetic.shapes import Shapes, write_shapes
from deformnet.data.voc import VOCDetection, VOCSegmentation
from deformnet.demo.figures import Shown, draw_overview, draw_predictions
from deformnet.demo.page import (
    comparison,
    detector_score,
    footnote,
    text_table,
    write_page,
)
from deformnet.demo.settings import Demo
from deformnet.engine import train
from deformnet.engine.runs import checkpoint_path, load_checkpoint
from deformnet.inference import DetectionPredictor, SegmentationPredictor, open_predictor
from deformnet.inspection.report.contents import of_label_map
from deformnet.inspection.report.network import Network
from deformnet.inspection.report.parts import find_parts
from deformnet.inspection.report.scenes import LARGE, SMALL, choose_scenes
from deformnet.metrics import ObjectCounts, size_scores
from deformnet.recipes import DeepLabRecipe, RFCNRecipe
from deformnet.visualization import SampledUnit, bins_figure, sampling_figure, save_figure

_PREDICTIONS, _SCENES, _PARTS = 6, 2, 6  # images in the pictures

# Measured on two cores of a Xeon, brought to 160x160 pixels; the mean of both networks.
_SECONDS_PER_ITERATION = 0.55
_SECONDS_PER_DETECTOR_ITERATION = 0.5
_SECONDS_PER_IMAGE = 0.03
_SECONDS_BESIDE = 30


def run_demo(demo: Demo, out: Path, say: Callable[[str], None]) -> None:
    """Runs the demo into a folder. What is there from an earlier call is used or continued.

    Args:
        demo: how large.
        out: the folder.
        say: takes the lines for the user.
    Raises:
        FileExistsError, ValueError: if `out` holds data or runs of other settings.
        deformnet.engine.TrainingStopped: after Ctrl-C.
    """
    say(
        f"A plain and a deformable network (DeepLab on ResNet-18) learn to segment made images: "
        f"{demo.images} of {demo.size}x{demo.size} pixels, {demo.iterations} iterations each, "
        f"scored on {demo.val} more. Then a detector with deformable pooling (R-FCN) learns to "
        f"find the same objects in {demo.detector_iterations} iterations. On two CPU cores this "
        f"takes about {_minutes(demo)} min; stopped with Ctrl-C, the same command continues."
    )
    data = out / "data"
    _make_images(demo, data, say)
    images = VOCSegmentation(data, "val")
    small, large = (round(share * demo.size**2) for share in (SMALL, LARGE))

    metrics: dict[str, dict[str, Any]] = {}
    predictors: dict[str, SegmentationPredictor] = {}
    predictions: dict[str, list[Tensor]] = {}
    for name, recipe in (("plain", _recipe(demo, 0)), ("deformable", _recipe(demo, 3))):
        run = out / "runs" / name
        say(f"{name} network: {_state(run, demo.iterations)}")
        metrics[name] = train(recipe, data, run)
        predictors[name] = SegmentationPredictor.from_run(run)
        objects = ObjectCounts(len(images.classes), small=small, large=large)
        predictions[name] = _predict(predictors[name], images, objects)
        scores = size_scores(objects.compute())
        metrics[name]["sizes"] = {s: score.to_json(images.classes) for s, score in scores.items()}
    run = out / "runs/detector"
    say(f"detector: {_state(run, demo.detector_iterations)}")
    say(
        "(Its offsets learn at ten times the rate of the rest, so that bins move far enough to be "
        "seen; warnings that they run away are right.)"
    )
    metrics["detector"] = train(_detector_recipe(demo), data, run)
    write_json(out / "metrics.json", {"settings": asdict(demo), **metrics})

    say("drawing")
    shown = [
        Shown(*images[index], *(predictions[name][index] for name in predictors))
        for index in range(min(_PREDICTIONS, len(images)))
    ]
    looks = _look(images, {name: Network(name, it) for name, it in predictors.items()})
    detector = open_predictor(run)
    assert isinstance(detector, DetectionPredictor)
    objects = VOCDetection(data, "val")
    parts = find_parts(detector, (objects[index] for index in range(len(objects))), _PARTS)
    save_figure(bins_figure(parts), out / "parts.png")
    draw_predictions(out / "predictions.png", shown, images.classes)
    save_figure(sampling_figure(looks), out / "sampling.png")
    draw_overview(out / "overview.png", shown, looks, images.classes)
    rows, note = comparison(metrics), footnote(demo)
    found = detector_score(metrics["detector"])
    write_page(out / "index.html", demo, rows, note, found, metrics["plain"]["machine"])
    say(f"\n{text_table(rows, note)}\n{found}\n\npictures: {out / 'index.html'}")


def _recipe(demo: Demo, deform_layers: Literal[0, 3]) -> DeepLabRecipe:
    return DeepLabRecipe(
        backbone="resnet18",
        deform_layers=deform_layers,
        short_side=demo.size,
        max_side=None,
        batch=8,
        iterations=demo.iterations,
        lr=0.03,
        # From random weights, offsets that learn as fast as the rest leave the map within a few
        # hundred iterations.
        offset_lr_scale=0.1,
        warmup=demo.iterations // 10,
        clip=5.0,
        seed=demo.seed,
    )


def _detector_recipe(demo: Demo) -> RFCNRecipe:
    return RFCNRecipe(
        backbone="resnet18",
        deform_layers=0,  # all that is deformable is the pooling, which is to be seen
        short_side=demo.size,
        max_side=None,
        anchor_sizes=(16, 32, 64),
        bins=3,  # as in Figure 7, where more would hide one another
        batch=8,
        iterations=demo.detector_iterations,
        lr=0.02,
        # At the rate of the rest, bins have hardly moved after so few iterations.
        offset_lr_scale=10.0,
        warmup=demo.detector_iterations // 10,
        clip=10.0,
        seed=demo.seed,
    )


def _make_images(demo: Demo, data: Path, say: Callable[[str], None]) -> None:
    say(f"images: {'made before' if data.is_dir() else 'making'}, {data}")
    # Easier than the usual set, since training is short: objects stand out, and are more.
    shapes = Shapes(
        train=demo.images,
        val=demo.val,
        height=demo.size,
        width=demo.size,
        warp=0.3,
        seed=demo.seed,
        objects=(2, 4),
        radius=(0.08, 0.42),
        clutter=0,
        mute=0.75,
    )
    write_shapes(data, shapes)


def _state(run: Path, iterations: int) -> str:
    """How far an earlier call came."""
    path = checkpoint_path(run)
    if not path.is_file():
        return "training"
    done = load_checkpoint(path)["global_step"]
    if done < iterations:
        return f"training goes on after iteration {done}"
    return f"trained before, {run}"


def _predict(
    predictor: SegmentationPredictor, images: VOCSegmentation, objects: ObjectCounts
) -> list[Tensor]:
    """Label maps of all images; counts what they find of the objects."""
    predictions = []
    for index in tqdm(range(len(images)), desc="objects by size", disable=None):
        image, truth = images[index]
        labels = predictor(image)
        objects.update(labels[None].long(), truth.as_subclass(torch.Tensor)[None].long())
        predictions.append(labels)
    return predictions


def _look(images: VOCSegmentation, networks: Mapping[str, Network]) -> dict[str, list[SampledUnit]]:
    """What units on the background, small and large objects sample in each network."""
    grid_of = networks["plain"].grid
    pairs = (images[index] for index in range(len(images)))
    contents = (
        (of_label_map(labels, images.classes, images.classes[1:]), grid_of(image))
        for image, labels in pairs
    )
    looks: dict[str, list[SampledUnit]] = {name: [] for name in networks}
    for scene in choose_scenes(contents, _SCENES):
        for name, network in networks.items():
            looks[name] += network.looks(images[scene.index][0], scene.units)
    return looks


def _minutes(demo: Demo) -> int:
    """About how long it takes on two cores, rounded up."""
    images = (demo.images + 4 * demo.val) * _SECONDS_PER_IMAGE
    training = 2 * demo.iterations * _SECONDS_PER_ITERATION
    training += demo.detector_iterations * _SECONDS_PER_DETECTOR_ITERATION
    seconds = _SECONDS_BESIDE + (images + training) * (demo.size / 160) ** 2
    return int(-(-seconds // 60))
