"""What `train` and `evaluate` return."""

import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from deformnet._files import write_json
from deformnet.engine.logs import read_log
from deformnet.engine.runs import machine, versions
from deformnet.recipes import Recipe, TestTimeAugmentation
from deformnet.tasks.base import Scores


@dataclass(frozen=True, kw_only=True)
class Result:
    """The scores of a run, and facts about it.

    Attributes:
        network: name of the network.
        iterations: iterations that it was trained for.
        seconds_per_iteration: median over the run; None if nothing was logged.
        parameters: number of its parameters.
        seed: seed of its recipe.
        versions: versions of Python and of the packages that decide numbers and speed.
        machine: processor, cores and accelerator.
        split: split that was scored; None if none was.
        images: number of images that were scored.
        scores: the scores of the task; None if nothing was scored.
        augmentation: test-time augmentation of the evaluation.
        files: entries of `metrics.json` for files that were written, such as a submission.
    """

    network: str
    iterations: int
    seconds_per_iteration: float | None
    parameters: int
    seed: int
    versions: dict[str, str | None] = field(default_factory=versions)
    machine: str = field(default_factory=machine)
    split: str | None = None
    images: int = 0
    scores: Scores | None = None
    augmentation: TestTimeAugmentation = field(default_factory=TestTimeAugmentation)
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The content of `metrics.json`."""
        scored: dict[str, object] = {}
        if self.scores is not None:
            scored = {"split": self.split, "images": self.images, **self.scores.json}
        if self.augmentation != TestTimeAugmentation():
            scored["augmentation"] = asdict(self.augmentation)
        return {
            **scored,
            **self.files,
            "network": self.network,
            "iterations": self.iterations,
            "seconds_per_iteration": self.seconds_per_iteration,
            "parameters": self.parameters,
            "seed": self.seed,
            "versions": self.versions,
            "machine": self.machine,
        }

    def __str__(self) -> str:
        """The scores in percent, and the facts."""
        lines = []
        if self.scores is not None:
            table = self.scores.table
            where = f" on {self.split} ({self.images} images), percent" if table.rows else ""
            lines.append(str(table._replace(title=f"{table.title}{where}")))
        usual = asdict(TestTimeAugmentation())
        chosen = {k: v for k, v in asdict(self.augmentation).items() if v != usual[k]}
        if chosen:
            settings = ", ".join(f"{name} {value}" for name, value in chosen.items())
            lines.append(f"test-time augmentation: {settings}")
        lines += [f"{name} in {path}" for name, path in self.files.items()]
        seconds = self.seconds_per_iteration
        pace = "" if seconds is None else f", {seconds:.3g} s each"
        size = f"{self.parameters / 1e6:.2f} M parameters"
        lines.append(f"trained for {self.iterations} iterations{pace}; {size}")
        return "\n".join(lines)

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module, run: Path, iterations: int) -> "Result":
        """The facts about a run, without scores."""
        seconds = [float(row["seconds"]) for row in read_log(run / "metrics.csv")]
        return cls(
            network=recipe.network,
            iterations=iterations,
            seconds_per_iteration=statistics.median(seconds) if seconds else None,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            seed=recipe.seed,
        )

    def save(self, folder: Path, suffix: str = "") -> "Result":
        """Writes metrics.json, and the predictions that were scored where the task keeps them.

        Args:
            suffix: ending of the file names, such as "-val".
        """
        files = {} if self.scores is None else self.scores.save(folder, suffix)
        result = replace(self, files=files)
        write_json(folder / f"metrics{suffix}.json", result.to_json())
        return result
