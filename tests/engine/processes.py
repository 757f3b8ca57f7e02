"""Runs in several processes, as torchrun starts them: the jobs of the tests, and their start.

As a program, `processes.py JOBS` does the jobs of a JSON file one after the other.
"""

import atexit
import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.distributed import run as launcher
from torch.distributed.launcher.api import elastic_launch

from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine import (
    Hardware,
    LoopOptions,
    Result,
    TrainingStopped,
    evaluate,
    propose,
    train,
)
from deformnet.engine.logs import read_log
from deformnet.engine.runs import iterations_done, load_checkpoint
from deformnet.engine.shared_norm import share_statistics
from deformnet.recipes import DeepLabRecipe, Recipe, RFCNRecipe, recipe_from_dict
from forks import Fork, at_exit

LIMIT = 240
"""Seconds after which processes count as hanging."""

CPU = Hardware(accelerator="cpu", workers=0)

Program = subprocess.Popen[str] | Fork
Job = dict[str, Any]


def small(recipe: type[Recipe], **changes: Any) -> Recipe:
    """A tiny ResNet on images of 32 pixels, 4 at a time, with frozen norm."""
    values: dict[str, Any] = {
        "backbone": "timm/test_resnet",
        "deform_layers": 1,
        "norm": "frozen",
        "short_side": 32,
        "max_side": None,
        "batch": 4,
        "iterations": 10,
        "warmup": 0,
        "lr": 0.002,
    }
    if recipe is not DeepLabRecipe:
        values |= {"anchor_sizes": (16, 32), "proposals": 20, "score_threshold": 0.0}
    return recipe(**(values | changes))


RECIPES = {"deeplab": small(DeepLabRecipe, lr=0.01), "rfcn": small(RFCNRecipe, lr=0.1)}


def write_images(root: Path) -> None:
    """Seven training and five validation images, of several sizes and some without objects."""
    write_shapes(root, Shapes(train=7, val=5, height=40, width=48))
    voc = root / "VOCdevkit/VOC2012"
    for number, path in enumerate(sorted((voc / "JPEGImages").glob("*.jpg"))):
        more = 8 * (number % 3)
        for file, color in ((path, (90, 90, 90)), (_mask(voc, path), 0)):
            with Image.open(file) as image:
                wider = Image.new(image.mode, (48 + more, 40), color)
                wider.paste(image)
                if (palette := image.getpalette()) is not None:
                    wider.putpalette(palette)
            wider.save(file)
        objects = voc / "Annotations" / f"{path.stem}.xml"
        text = objects.read_text().replace("<width>48</width>", f"<width>{48 + more}</width>")
        if number % 4 == 1:
            text = text[: text.index("<object>")] + "</annotation>"
        objects.write_text(text)


def _mask(voc: Path, image: Path) -> Path:
    return voc / "SegmentationClass" / f"{image.stem}.png"


def run(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    val_split: str | None = None,
    proposals: Sequence[Path] = (),
    devices: int | None = None,
    workers: int = 0,
    **options: Any,
) -> Result:
    """`train` on CPUs with every iteration in the log; options of the loop by name."""
    return train(
        *(recipe, data, out),
        val_split=val_split,
        proposals=proposals,
        hardware=Hardware(accelerator="cpu", workers=workers, devices=devices),
        loop=LoopOptions(**({"progress": False, "log_every": 1} | options)),
    )


def stop_after(iteration: int, patch: pytest.MonkeyPatch) -> None:
    """Asks the next run of this process to stop, as batch systems do, in one of its iterations."""
    after_step(iteration, lambda: signal.raise_signal(signal.SIGTERM), patch)


def after_step(
    iteration: int, act: Callable[[], None], patch: pytest.MonkeyPatch, done: int = 0
) -> None:
    """Acts once, after the optimizer's step of an iteration."""
    step, count = torch.optim.SGD.step, itertools.count(done + 1)

    def acting(self: torch.optim.SGD, closure: None = None) -> None:
        step(self, closure)
        if next(count) == iteration:
            act()

    patch.setattr(torch.optim.SGD, "step", acting)


def run_stopped(iteration: int, recipe: Recipe, data: Path, out: Path, **options: Any) -> None:
    """A run that is asked to stop in an iteration."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(iteration, patch)
        message = f"stopped after {iteration} of {recipe.iterations} iterations"
        with pytest.raises(TrainingStopped, match=message):
            run(recipe, data, out, **options)
    assert iterations_done(out) == iteration


def curve(out: Path) -> list[float]:
    """The loss of each iteration."""
    return [float(row["loss"]) for row in read_log(out / "metrics.csv")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "checkpoints/last.ckpt")["model"]


def assert_equal_weights(out: Path, expected: Path) -> None:
    ended = weights(out)
    for name, tensor in weights(expected).items():
        assert torch.equal(ended[name], tensor), name


def assert_close_weights(out: Path, expected: Path) -> None:
    ended = weights(out)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(ended[name], tensor, rtol=1e-4, atol=1e-5)


def forked_torchrun(
    jobs: list[Job], folder: Path, *options: str, host: int | None = None, **environment: str
) -> Fork:
    """Does jobs under torchrun, as `torchrun` does; but the processes that it starts are forks.

    Args:
        host: a process, in whose network it runs.
    """
    printed = folder / f"torchrun-{len(list(folder.glob('torchrun-*')))}.txt"
    if not any(option.startswith("--nnodes") for option in options):
        options = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *options)
    return Fork(printed, _torchrun, _plain(jobs), options, host, **environment)


def _torchrun(jobs: list[Job], options: Sequence[str], host: int | None) -> None:
    if host is not None:
        for kind in ("user", "net"):
            with Path(f"/proc/{host}/ns/{kind}").open() as file:
                assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) == 0, kind
    words = launcher.parse_args(["--start-method=fork", *options, "a function"])
    config, _, _ = launcher.config_from_args(words)
    elastic_launch(config, _worker)(jobs)


def _worker(jobs: list[Job]) -> None:
    do(jobs)
    at_exit()


def torchrun(jobs: list[Job], folder: Path, *options: str) -> list[str]:
    """The command that does jobs under torchrun, with a free port."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(_plain(jobs)))
    python = [sys.executable, "-m", "torch.distributed.run"]
    return [*python, "--standalone", *options, __file__, str(file)]


def _plain(jobs: list[Job]) -> list[Job]:
    """The jobs with paths as text, as they are in a file."""
    return json.loads(json.dumps(jobs, default=str))


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Starts a program, on one thread, that can import what the tests can."""
    usual = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command,
        env=os.environ | usual | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(process: Program, out: Path, count: int) -> None:
    """Waits until a run that goes on has written rows of its log."""
    deadline = time.monotonic() + LIMIT
    while len(read_log(out / "metrics.csv")) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait(*processes: Program) -> list[str]:
    """What the processes print until they end; they must end well, and in time."""
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text
    return printed


def _train(job: Job) -> None:
    recipe = recipe_from_dict(job["recipe"], source="job")
    run(recipe, job["data"], job["out"], **job.get("options", {}))


def _evaluate(job: Job) -> None:
    evaluate(job["out"], job["data"], "val", hardware=CPU, progress=False)


def _propose(job: Job) -> None:
    propose_boxes(Path(job["run"]), Path(job["data"]), Path(job["out"]))


def propose_boxes(run: Path, data: Path, out: Path) -> None:
    propose(run, data, "val", out, hardware=CPU, progress=False)


def _disagree(job: Job) -> None:
    """Every process writes down the message that refuses other data, or another recipe."""
    rank = os.environ["RANK"]
    recipe = recipe_from_dict(job["recipe"] | job["changes"][int(rank)], source="job")
    try:
        run(recipe, Path(job["data"][int(rank)]), Path(job["out"]))
    except ValueError as error:
        Path(f"{job['out']}-{rank}.txt").write_text(str(error))


def _norm(job: Job) -> None:
    """One step of batch norm in each process, after a run, which connects them."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    layer, x, direction = norm_case()
    share_statistics(layer, torch.device("cpu"))
    x = x[rank::processes].clone().requires_grad_()
    y = layer(x)
    (y * direction[rank::processes]).sum().backward()
    values = {"y": y, "x": x.grad, "weight.grad": layer.weight.grad, **layer.state_dict()}
    torch.save(values, f"{job['out']}-{rank}.pt")


def norm_case() -> tuple[torch.nn.BatchNorm2d, torch.Tensor, torch.Tensor]:
    """A layer, values whose mean is far from zero, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(4, 3, 5, 2, generator=generator).double() for _ in range(2))
    layer = torch.nn.BatchNorm2d(3).double()
    torch.nn.init.uniform_(layer.weight, generator=generator)
    return layer, x * 3 + 100, direction


def _killed(job: Job) -> None:
    """A run in which the last process is killed once, after an iteration.

    What is then in the run folder is copied before another attempt.
    """
    out, attempt = Path(job["out"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if attempt == "0" and rank == processes - 1:
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        after_step(job["after"], kill, pytest.MonkeyPatch())
    if rank == 0:
        done = iterations_done(out) if out.exists() else 0
        print(f"attempt {attempt} from iteration {done}", flush=True)
        if attempt == "1":
            shutil.copytree(out, f"{out}-when-killed")
    _train(job)


_JOBS: dict[str, Callable[[Job], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "propose": _propose,
    "disagree": _disagree,
    "norm": _norm,
    "killed": _killed,
}


def do(jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    atexit.register(_fail_if_connected)  # the first to be registered is the last to be called
    for job in jobs:
        _JOBS[job["do"]](job)


def _fail_if_connected() -> None:
    """Ends a process as failed that would come down with its connections open."""
    if torch.distributed.is_initialized():
        print("this process ends while it is connected to others", flush=True)
        os._exit(1)


if __name__ == "__main__":
    do(json.loads(Path(sys.argv[1]).read_text()))
