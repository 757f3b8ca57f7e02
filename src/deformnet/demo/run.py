"""Trains a baseline and a deformable network on synthetic images and compares them; and a detector.

```
OUT/
  index.html                the page: table and figures
  metrics.json              the numbers of the table, and the settings
  overview.png, predictions.png, sampling.png, parts.png
  data/                     the synthetic images, in VOC layout
  runs/baseline, runs/deformable, runs/detector
```
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from torch import Tensor
from tqdm import tqdm

from deformnet._files import write_json
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.data.voc import VOCSegmentation
from deformnet.demo.figures import Example, draw_overview, draw_predictions
from deformnet.demo.page import (
    NetworkMetrics,
    comparison,
    detector_score,
    footnote,
    write_demo_page,
)
from deformnet.demo.settings import Demo
from deformnet.engine import Result, train
from deformnet.engine.runs import checkpoint_path, iterations_done, machine
from deformnet.inspection.report.bins import find_bins
from deformnet.inspection.report.recording import UnitRecorder
from deformnet.inspection.report.scenes import LARGE, SMALL, choose_scenes
from deformnet.inspection.runs import OpenedRun
from deformnet.metrics import ObjectCounts, size_scores
from deformnet.recipes import DeepLabRecipe, Recipe, RFCNRecipe
from deformnet.tasks.segmentation import LabelMap
from deformnet.visualization import SampledUnit, bins_figure, sampling_figure, save_figure

_EXAMPLES, _SCENES, _DETECTIONS = 6, 2, 6  # images in the figures

# Measured on two cores of a Xeon with images of 160x160 pixels; means of both networks.
_SECONDS_PER_ITERATION = 0.55
_SECONDS_PER_DETECTOR_ITERATION = 0.5
_SECONDS_PER_IMAGE = 0.03
_OTHER_SECONDS = 30


def run_demo(demo: Demo, out: Path, say: Callable[[str], None]) -> None:
    """Run the demo into a folder. Results of an earlier call are used or continued.

    Args:
        demo: size of the demo.
        out: output folder.
        say: receives the lines for the user.
    Raises:
        FileExistsError, UserError: if `out` holds data or runs of other settings.
        deformnet.engine.TrainingStopped: after Ctrl-C.
    """
    say(
        f"Trains DeepLab on ResNet-18 without deformable layers (baseline) and with them, on "
        f"{demo.images} synthetic images of {demo.size}x{demo.size} pixels, for {demo.iterations} "
        f"iterations each, and evaluates both on {demo.val} more images. Then trains R-FCN with "
        f"deformable RoI pooling on the same images for {demo.detector_iterations} iterations. "
        f"This takes about {_minutes(demo)} min on two CPU cores; after Ctrl-C, the same command "
        "resumes."
    )
    data = out / "data"
    _generate_images(demo, data, say)
    images = VOCSegmentation(data, "val")
    segmenter = _segmenter(demo)
    results = {
        name: _train(f"{name} network", recipe, data, out / "runs" / name, say)
        for name, recipe in (("baseline", segmenter.baseline()), ("deformable", segmenter))
    }
    runs = {name: OpenedRun(out / "runs" / name) for name in results}
    metrics: dict[str, NetworkMetrics] = {}
    predictions: dict[str, list[Tensor]] = {}
    for name, run in runs.items():
        predictions[name], sizes = _evaluate_by_size(run, images, demo.size)
        metrics[name] = cast(NetworkMetrics, {**results[name].to_json(), "sizes": sizes})
    say(
        "(The offsets of the detector learn ten times as fast as its other layers, so that bins "
        "move visibly; warnings about runaway offsets are expected.)"
    )
    detector = _train("detector", _detector(demo), data, out / "runs/detector", say)
    assert detector.scores is not None
    score = detector_score(detector.scores.summary["mAP@0.5"])
    content = {"settings": asdict(demo), **metrics, "detector": detector.to_json()}
    write_json(out / "metrics.json", content)

    say("drawing figures")
    _draw_segmentation(images, runs, predictions, out)
    _draw_bins(OpenedRun(out / "runs/detector"), data, out / "parts.png")
    table = comparison(metrics["baseline"], metrics["deformable"])
    write_demo_page(out / "index.html", demo, table, score, machine())
    say(f"\n{table}\n{footnote(demo)}\n{score}\n\npage: {out / 'index.html'}")


def _segmenter(demo: Demo) -> DeepLabRecipe:
    return DeepLabRecipe(
        backbone="resnet18",
        deform_layers=3,
        short_side=demo.size,
        max_side=None,
        batch=8,
        iterations=demo.iterations,
        lr=0.03,
        # From random weights, offsets that learn as fast as the other layers leave the map within
        # a few hundred iterations.
        offset_lr_scale=0.1,
        warmup=demo.iterations // 10,
        clip=5.0,
        seed=demo.seed,
    )


def _detector(demo: Demo) -> RFCNRecipe:
    return RFCNRecipe(
        backbone="resnet18",
        deform_layers=0,  # only the pooling is deformable
        short_side=demo.size,
        max_side=None,
        anchor_sizes=(16, 32, 64),
        bins=3,  # as in Figure 7; more would hide each other
        batch=8,
        iterations=demo.detector_iterations,
        lr=0.02,
        # At the learning rate of the other layers, bins hardly move in so few iterations.
        offset_lr_scale=10.0,
        warmup=demo.detector_iterations // 10,
        clip=10.0,
        seed=demo.seed,
    )


def _generate_images(demo: Demo, data: Path, say: Callable[[str], None]) -> None:
    say(f"images: {'generated before' if data.is_dir() else 'generating'}, {data}")
    # Easier than the default, as training is short: objects stand out, and there are more.
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


def _train(name: str, recipe: Recipe, data: Path, run: Path, say: Callable[[str], None]) -> Result:
    """Train a network, or resume its training, and evaluate it."""
    done = iterations_done(run) if checkpoint_path(run).is_file() else 0
    if done == recipe.iterations:
        say(f"{name}: trained before, {run}")
    else:
        say(f"{name}: {f'resuming after iteration {done}' if done else 'training'}")
    return train(recipe, data, run)


def _evaluate_by_size(
    run: OpenedRun, images: VOCSegmentation, size: int
) -> tuple[list[Tensor], dict[str, object]]:
    """Return the label maps of the first images, and the scores of objects by their size."""
    small, large = (round(fraction * size**2) for fraction in (SMALL, LARGE))
    objects = ObjectCounts(len(images.classes), small=small, large=large)
    predictions = []
    for index in tqdm(range(len(images)), desc="objects by size", disable=None):
        image, mask = images[index]
        labels = run.predictor.predict(image)
        objects.update(labels[None].long(), mask.as_subclass(Tensor)[None].long())
        if index < _EXAMPLES:
            predictions.append(labels)
    scores = size_scores(objects.compute())
    return predictions, {name: it.to_json(images.classes) for name, it in scores.items()}


def _sample(
    images: VOCSegmentation, networks: Mapping[str, UnitRecorder]
) -> dict[str, list[SampledUnit]]:
    """Record units on the background, small and large objects in each network."""
    pairs = (images[index] for index in range(len(images)))
    classes = images.classes
    contents = (
        (LabelMap(mask, classes).contents(classes[1:]), networks["baseline"].grid(image))
        for image, mask in pairs
    )
    sampled: dict[str, list[SampledUnit]] = {name: [] for name in networks}
    for scene in choose_scenes(contents, _SCENES):
        for name, network in networks.items():
            sampled[name] += network.samples(images[scene.index][0], scene.units)
    return sampled


def _draw_segmentation(
    images: VOCSegmentation,
    runs: Mapping[str, OpenedRun],
    predictions: Mapping[str, list[Tensor]],
    out: Path,
) -> None:
    examples = [
        Example(*images[k], *labels)
        for k, labels in enumerate(zip(*predictions.values(), strict=True))
    ]
    sampled = _sample(images, {name: UnitRecorder(name, run) for name, run in runs.items()})
    draw_predictions(out / "predictions.png", examples, images.classes)
    save_figure(sampling_figure(sampled), out / "sampling.png")
    draw_overview(out / "overview.png", examples, sampled, images.classes)


def _draw_bins(run: OpenedRun, data: Path, path: Path) -> None:
    images = run.task.annotated(data, "val", run.data)
    pairs = (images[index] for index in range(len(images)))
    save_figure(bins_figure(find_bins(run.predictor, pairs, _DETECTIONS)), path)


def _minutes(demo: Demo) -> int:
    """Estimate the time on two cores, rounded up."""
    images = (demo.images + 4 * demo.val) * _SECONDS_PER_IMAGE
    training = 2 * demo.iterations * _SECONDS_PER_ITERATION
    training += demo.detector_iterations * _SECONDS_PER_DETECTOR_ITERATION
    seconds = _OTHER_SECONDS + (images + training) * (demo.size / 160) ** 2
    return int(-(-seconds // 60))
