"""The model card of exported weights."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from deformnet._hub import address_of
from deformnet.data.files import listing
from deformnet.engine.runs import TrainedRun
from deformnet.recipes import Recipe
from deformnet.tasks import task_of

_Metrics = Mapping[str, Mapping[str, object]]


def model_card(weights: str, trained: TrainedRun, metrics: _Metrics) -> str:
    """The model card as Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        weights: name of the weights file.
        trained: the trained network.
        metrics: content of every metrics*.json of the run, by file name.
    """
    recipe, model, data = trained
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""\
---
library_name: deformnet
pipeline_tag: {task_of(recipe).pipeline_tag}
tags:
- deformable-convolution
---

# {recipe.network} on {recipe.backbone}

A network trained with deformnet, a library of deformable convolutional networks
([Dai et al. 2017](https://arxiv.org/abs/1703.06211)) for PyTorch.

- Network: {_network(recipe)}; {parameters / 1e6:.2f} M parameters
- Input: RGB images of any size, which the predictor resizes and normalizes
- Classes ({len(data.classes)}): {listing([_plain(name) for name in data.classes])}
- Training data: {data.images} images (SHA-256 of their names: {data.digest[:16]}...)
- Training: {_training(recipe)}
- Initial weights: {_plain(_initial(recipe))}

`{Path(weights).stem}.json` contains the full recipe, all scores, package versions, and the SHA-256
of the weights, which is verified on loading.

## Scores

{chr(10).join(_scores(metrics))}

## Use

```
pip install 'deformnet[train]'
```

```python
import deformnet

predict = deformnet.load("{weights}")  # from the Hub: deformnet.load("hf://OWNER/REPO")
result = predict("photo.jpg")
result.plot().save("result.png")
```

To fine-tune these weights on your own data:

```
deformnet train {recipe.network} --init {weights} --data DIR --out RUN
```

## License

Not stated. Owner of these weights: add `license: NAME` to the metadata at the top of this file, and
state the names and terms of the training data and of the initial weights here.
"""


def _network(recipe: Recipe) -> str:
    parts = [f"{recipe.network} on {recipe.backbone}"]
    if recipe.neck != "none":
        size = f"{recipe.neck_layers} layers, {recipe.neck_channels} channels"
        parts.append(f"{recipe.neck} neck ({size})")
    modulated = " (modulated)" if recipe.modulated else ""
    parts.append(f"deformable layers: {recipe.deform_layers}{modulated}")
    return ", ".join(parts)


def _initial(recipe: Recipe) -> str:
    """Name of the initial weights, without local folders."""
    init = recipe.init or "random"
    return init if address_of(init) is not None else Path(init).name


def _training(recipe: Recipe) -> str:
    return (
        f"{recipe.iterations} iterations, batch size {recipe.batch}, {recipe.optimizer}, learning "
        f"rate {recipe.lr:g}, {recipe.schedule} schedule, seed {recipe.seed}"
    )


def _scores(metrics: _Metrics) -> Iterator[str]:
    """A table of the scores on each split."""
    rows: list[tuple[str, dict[str, object]]] = []
    for scores in metrics.values():
        if isinstance(percent := scores.get("percent"), dict):
            augmented = " (test-time augmentation)" if "augmentation" in scores else ""
            split = f"{_plain(str(scores.get('split')))}{augmented} | {scores.get('images')}"
            rows.append((split, percent))
    if not rows:
        evaluated = any("split" in scores for scores in metrics.values())  # by an earlier version
        yield "See the JSON file." if evaluated else "None: the run has not been evaluated."
        return
    names = list(dict.fromkeys(name for _, percent in rows for name in percent))
    yield f"In percent:\n\n| split | images | {' | '.join(names)} |"
    yield "|---" * (2 + len(names)) + "|"
    for split, percent in rows:
        yield f"| {split} | {' | '.join(_score(percent.get(name)) for name in names)} |"


def _score(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float | int) else "-"


def _plain(text: str) -> str:
    """Text on one line, with the special characters of Markdown and HTML escaped."""
    return escape(" ".join(text.split()), quote=False).replace("|", "&#124;").replace("`", "&#96;")
