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
    """The scores of a run, and facts about it."""

    network: str
    iterations: int
    """Iterations that the network was trained for."""
    seconds_per_iteration: float | None
    """Median over the run; None if nothing was logged."""
    parameters: int
    """Number of parameters."""
    seed: int
    versions: dict[str, str | None] = field(default_factory=versions)
    machine: str = field(default_factory=machine)
    split: str | None = None
    """Split that was scored."""
    images: int = 0
    """Number of images that were scored."""
    scores: Scores | None = None
    augmentation: TestTimeAugmentation = field(default_factory=TestTimeAugmentation)
    files: dict[str, str] = field(default_factory=dict)
    """Entries of `metrics.json` for files that were written, such as a submission."""

    def to_json(self) -> dict[str, object]:
        """The content of `metrics.json`."""
        scored: dict[str, object] = {}
        if self.scores is not None:
            scored = {
                "split": self.split,
                "images": self.images,
                "percent": self.scores.summary,
                **self.scores.json,
            }
        if self.augmentation != TestTimeAugmentation():
            scored["augmentation"] = asdict(self.augmentation)
        names = ("network", "iterations", "seconds_per_iteration", "parameters", "seed")
        facts = {name: getattr(self, name) for name in (*names, "versions", "machine")}
        return {**scored, **self.files, **facts}

    def __str__(self) -> str:
        """The scores in percent, and the facts."""
        lines = []
        if self.scores is not None:
            table = self.scores.table
            where = f" on {self.split} ({self.images} images), percent" if table.rows else ""
            lines.append(str(table._replace(title=f"{table.title}{where}")))
            lines += [str(it._replace(title=f"{it.title}, percent")) for it in self.scores.details]
        usual = asdict(TestTimeAugmentation())
        changed = [f"{k} {v}" for k, v in asdict(self.augmentation).items() if v != usual[k]]
        if changed:
            lines.append(f"test-time augmentation: {', '.join(changed)}")
        lines += [f"{name} in {path}" for name, path in self.files.items()]
        pace = "" if (s := self.seconds_per_iteration) is None else f", {s:.3g} s each"
        size = f"{self.parameters / 1e6:.2f} M parameters"
        lines.append(f"trained for {self.iterations} iterations{pace}; {size}")
        return "\n".join(lines)

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module, run: Path, iterations: int) -> "Result":
        """The facts about a run, without scores."""
        rows = read_log(run / "metrics.csv")
        seconds = [float(row["seconds"]) for row in rows if row.get("seconds")]
        return cls(
            network=recipe.network,
            iterations=iterations,
            seconds_per_iteration=statistics.median(seconds) if seconds else None,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            seed=recipe.seed,
        )

    def save(self, folder: Path, suffix: str = "") -> "Result":
        """Writes metrics{suffix}.json, pictures, and the predictions if the task keeps them.

        Raises:
            UnsavedScores: if a file cannot be written.
        """
        try:
            files = {} if self.scores is None else self.scores.save(folder, suffix)
            result = replace(self, files=files)
            write_json(folder / f"metrics{suffix}.json", result.to_json())
        except (OSError, MemoryError) as error:
            raise UnsavedScores(self, error) from error
        return result


class UnsavedScores(OSError):
    """A file of scores cannot be written because of `error`; `result` contains the scores."""

    def __init__(self, result: Result, error: OSError | MemoryError) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            super().__init__(error.errno, error.strerror, error.filename)
        else:
            super().__init__(f"scores not written ({str(error) or 'out of memory'})")
        self.result, self.error = result, error
