"""Trains plain, dilated and deformable networks on a frozen ImageNet backbone and compares them.

```
OUT/
  index.html                the page: gain, tables and figures
  metrics.json              the numbers on the page, and the settings
  overview.png, predictions.png, sampling.png, parts.png
  data/                     the synthetic images, in VOC layout
  features/                 cached features of the frozen backbone
  runs/KIND-NETWORK-SEED    run folders, with their scores in demo.json
```
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from pathlib import Path
from statistics import mean
from typing import cast

from deformnet._errors import UserError
from deformnet._files import write_json
from deformnet.analysis import LayerDilation
from deformnet.data.synthetic import write_shapes
from deformnet.demo.figures import Example, draw_overview, draw_predictions
from deformnet.demo.page import (
    DEFORMABLE,
    PLAIN,
    TEMPLATE,
    Scores,
    gains,
    headline,
    score_table,
    size_table,
)
from deformnet.demo.plan import TITLES, Kind, Run, recipes, require_weights, shapes
from deformnet.demo.settings import Demo
from deformnet.demo.training import (
    SIDE,
    Trained,
    cache_features,
    processes,
    train_all,
)
from deformnet.engine.runs import machine
from deformnet.inspection.pages import write_page
from deformnet.inspection.report.bins import find_bins
from deformnet.inspection.report.recording import UnitRecorder
from deformnet.inspection.report.scenes import Scene, choose_scenes
from deformnet.inspection.runs import OpenedRun
from deformnet.recipes import Recipe
from deformnet.tasks import task_of
from deformnet.tasks.annotations import AnnotatedImages
from deformnet.tasks.predictor import Predictor
from deformnet.tasks.segmentation import LabelMap
from deformnet.visualization import SampledUnit, bins_figure, sampling_figure, save_figure

_SCENES, _EXAMPLES, _DETECTIONS = 2, 4, 6  # images in the figures
_MEAN_IOU = f"{TITLES['segmentation']}, mean IoU"
_HELD_OUT = 0.25  # fraction of the training images to score if there is no validation split

# Seconds of one core of an AMD EPYC, for images of 384x384 pixels.
_PER_ITERATION: Mapping[Kind, float] = {"segmentation": 0.12, "detection": 0.22}
_PER_RUN = 15
_PER_IMAGE = 0.25
_OTHER = 30


def run_demo(demo: Demo, out: Path, say: Callable[[str], None]) -> None:
    """Run the demo into a folder. Results of an earlier call are used or continued.

    Args:
        demo: images and size of the demo.
        out: output folder.
        say: receives the lines for the user.
    Raises:
        FileExistsError, UserError: if `out` holds data or runs of other settings, or the weights
            are not installed.
        FileNotFoundError: if `demo.data` holds neither masks nor boxes.
        deformnet.engine.TrainingStopped: after Ctrl-C.
    """
    require_weights()
    data = out / "data" if demo.data is None else demo.data
    if demo.data is None:
        say(f"images: {'already generated' if data.is_dir() else 'generating'}, {data}")
        write_shapes(data, shapes(demo))
    runs = _runs(demo, data, out, say)
    kinds: dict[Kind, Run] = {run.kind: run for run in runs}
    counts = [len(_annotated(runs[0], split)) for split in runs[0].splits]
    say(
        f"Trains {' and '.join(TITLES[kind] for kind in kinds)}, with and without deformable "
        f"layers, with {demo.seeds} seed{'s' if demo.seeds > 1 else ''} on {counts[0]} images, and "
        f"scores them on {counts[1]} others. The backbone, EfficientNet-Lite0 with ImageNet "
        "weights, is frozen, so its features are computed only once. This takes about "
        f"{_minutes(demo, runs, sum(counts))} min on this machine. To resume after Ctrl-C, repeat "
        "the command."
    )
    for run in kinds.values():
        cache_features(run)
    trained = dict(zip(runs, train_all(runs, say), strict=True))
    scores = _scores(trained)
    if not scores:
        raise UserError(f"{data}: expected objects in the validation images, but found none")
    kind, layers = _dilation(trained)
    content = {
        "settings": {**asdict(demo), "data": str(data)},
        "scores": scores,
        "effective dilation": [asdict(layer) for layer in layers],
        "machine": machine(),
    }
    write_json(out / "metrics.json", content)

    say("drawing figures")
    pictures = _draw([run for run in runs if run.recipe.seed == demo.seed], scores, out)
    found, table = gains(scores), score_table(scores, demo.seed)
    values = {
        "title": headline(found),
        "gains": found,
        "scores": table,
        "dilation": size_table(layers),
        "dilation_of": TITLES[kind],
        "demo": demo,
        "kinds": list(kinds),
        "images": counts,
        "pictures": pictures,
        "side": SIDE,
        "machine": machine(),
    }
    write_page(out / "index.html", TEMPLATE, values)
    lines = "\n".join(f"- {gain}" for gain in found)
    say(f"\n{table}\n\n{headline(found)}.\n{lines}\n\npage: {out / 'index.html'}")


def _runs(demo: Demo, data: Path, out: Path, say: Callable[[str], None]) -> list[Run]:
    """All runs, one seed after the other, so that the first ones are already informative.

    Raises:
        FileNotFoundError, UserError: if the data hold neither masks nor boxes.
    """
    networks = recipes(demo)
    splits: dict[Kind, tuple[str, str]] = {}
    for kind, of_kind in networks.items():
        try:
            splits[kind] = _splits(of_kind[PLAIN], data)
        except (FileNotFoundError, UserError) as error:
            if kind == "detection" and not splits:
                raise
            say(f"skipping {TITLES[kind]}: {error}")
    return [
        Run(
            kind=kind,
            network=name,
            recipe=replace(recipe, seed=seed),
            data=data,
            splits=splits[kind],
            folder=out / "runs" / f"{kind}-{name}-{seed}",
            features=out / "features",
        )
        for seed in range(demo.seed, demo.seed + demo.seeds)
        for kind in splits
        for name, recipe in networks[kind].items()
    ]


def _splits(recipe: Recipe, data: Path) -> tuple[str, str]:
    """The training and validation splits; raises if they cannot be read."""
    task = task_of(recipe)
    splits = ("train", "val")
    if task.validation(data, None, "val") is None:
        splits = (f"train[without={_HELD_OUT}]", f"train[held-out={_HELD_OUT}]")
    for split in splits:
        task.annotated(data, split)
    return splits


def _annotated(run: Run, split: str) -> AnnotatedImages:
    return task_of(run.recipe).annotated(run.data, split)


def _scores(trained: Mapping[Run, Trained]) -> dict[str, dict[str, list[float]]]:
    """Scores by metric and network, in the order of the seeds; omits metrics that are undefined."""
    found: dict[str, dict[str, list[float]]] = {}
    missing = set()
    for run, result in trained.items():
        for name, value in result.scores.items():
            metric = f"{TITLES[run.kind]}, {name}"
            if value is None:
                missing.add(metric)
            else:
                found.setdefault(metric, {}).setdefault(run.network, []).append(value)
    return {metric: networks for metric, networks in found.items() if metric not in missing}


def _dilation(trained: Mapping[Run, Trained]) -> tuple[Kind, list[LayerDilation]]:
    """Table 2 over all seeds: of R-FCN, as in the paper, or of DeepLab if only that was trained."""
    kind = list(trained)[-1].kind
    rows = [result.dilation for run, result in trained.items() if run.kind == kind]
    layers = zip(*(row for row in rows if row), strict=True)
    return kind, [reduce(add, of_layer) for of_layer in layers]


def _draw(runs: Sequence[Run], scores: Scores, out: Path) -> list[str]:
    """Draw the figures from the runs of one seed; return the names of those for the page."""
    kind = runs[0].kind
    opened = {run.network: OpenedRun(run.folder) for run in runs if run.kind == kind}
    images = _annotated(runs[0], runs[0].splits[1])
    objects = images.countable or images.classes
    recorders = {name: UnitRecorder(name, opened[name]) for name in (PLAIN, DEFORMABLE)}
    contents = (
        (truth.contents(objects), recorders[PLAIN].grid(image))
        for image, truth in (images[index] for index in range(len(images)))
    )
    scenes = choose_scenes(contents, _SCENES)
    sampled = _sample(images, recorders, scenes)
    names = []
    if sampled:
        save_figure(sampling_figure(sampled), out / "sampling.png")
        names.append("sampling")
    if kind == "segmentation":
        first = [scene.index for scene in scenes]
        others = [index for index in range(len(images)) if index not in first]
        chosen = (first + others)[:_EXAMPLES]
        titles = {name: f"{name}: {mean(own):.1f}" for name, own in scores[_MEAN_IOU].items()}
        shown = {titles[name]: run.predictor for name, run in opened.items()}
        examples = [_example(shown, images, index) for index in chosen]
        draw_predictions(out / "predictions.png", examples, images.classes)
        names.append("predictions")
        if sampled:
            draw_overview(out / "overview.png", examples, sampled, images.classes)
    if runs[-1].kind == "detection":
        run = runs[-1]
        images = _annotated(run, run.splits[1])
        pairs = (images[index] for index in range(len(images)))
        if bins := find_bins(OpenedRun(run.folder).predictor, pairs, _DETECTIONS):
            save_figure(bins_figure(bins), out / "parts.png")
            names.append("parts")
    return names


def _sample(
    images: AnnotatedImages, networks: Mapping[str, UnitRecorder], scenes: Sequence[Scene]
) -> dict[str, list[SampledUnit]]:
    """Record units on the background, on small and on large objects in each network."""
    sampled: dict[str, list[SampledUnit]] = {}
    for scene in scenes:
        for name, network in networks.items():
            units = network.samples(images[scene.index][0], scene.units)
            sampled.setdefault(name, []).extend(units)
    return sampled


def _example(networks: Mapping[str, Predictor], images: AnnotatedImages, index: int) -> Example:
    image, truth = images[index]
    labels = cast(LabelMap, truth).labels
    return Example(image, labels, {name: it.predict(image) for name, it in networks.items()})


def _minutes(demo: Demo, runs: Sequence[Run], images: int) -> int:
    """Estimate the time, rounded up."""
    iterations = sum(run.recipe.iterations * _PER_ITERATION[run.kind] for run in runs)
    pixels = (demo.size / 384) ** 2
    seconds = (images * _PER_IMAGE + iterations) * pixels + len(runs) * _PER_RUN
    return int(-(-(_OTHER + seconds / processes()) // 60))
