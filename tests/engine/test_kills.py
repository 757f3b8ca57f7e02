"""Kills, requests to stop and pauses change no bit of the result and leave nothing behind.

DEFORMNET_FUZZ is the number of runs that are disturbed at random times; one in 20 is started from
the command line, which is slow.
"""

import collections
import dataclasses
import gc
import os
import shutil
import signal
import time
from pathlib import Path

import kills
import pytest
import torch
from kills import KINDS, Forked, Kind, Started, Trial, contents, require_equal

from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine.runs import checkpoint_path, load_checkpoint

COUNT = int(os.environ.get("DEFORMNET_FUZZ", "3"))
SEED = int(os.environ.get("DEFORMNET_FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "folder"
    look = {"height": 40, "width": 44, "radius": (0.4, 0.45), "clutter": 0, "warp": 0.0}
    write_shapes(root, Shapes(train=24, val=6, mute=1.0, layout="image-folder", **look))
    return root


def undisturbed(kind: Kind, data: Path, folder: Path) -> tuple[Path, float]:
    """The folder of an undisturbed run, and its duration in seconds."""
    folder.mkdir()
    start = time.monotonic()
    codes = ended(kind, data, folder)
    assert set(codes) == {0}, (folder / "log.txt").read_text()
    checkpoint = load_checkpoint(checkpoint_path(folder / "run"))
    assert checkpoint["iteration"] == kills.RECIPE.iterations
    return folder / "run", time.monotonic() - start


def ended(kind: Kind, data: Path, folder: Path) -> list[int | None]:
    """The exit codes of a run in `folder`."""
    run = Forked(kind, data, folder / "run", folder / "log.txt")
    while None in run.codes():
        time.sleep(0.01)
    return run.codes()


def test_disturbed_runs_end_in_the_same_bits(data: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # garbage collection in a child would copy all of its memory
    expected: dict[Kind, tuple[Path, float]] = {}
    done: collections.Counter[str] = collections.Counter()
    for number in range(SEED, SEED + COUNT):
        kind = KINDS[number % len(KINDS)]
        start = Started if number % 20 == 19 else Forked
        usual = dataclasses.replace(kind, workers=0)  # the bits depend only on the ranks
        if usual not in expected:
            expected[usual] = undisturbed(usual, data, tmp_path / f"expected-{len(expected)}")
        out, duration = expected[usual]
        (folder := tmp_path / "trial").mkdir()
        seconds = duration + 5 if start is Started else duration * 1.2
        trial = Trial(number, kind, start, data, folder, seconds)
        require_equal(trial.run(), out, trial.story())
        done.update(it for it in trial.done if not it.startswith("codes"))
        shutil.rmtree(folder)
    print(f"{COUNT} runs:", ", ".join(f"{count} x {what}" for what, count in done.most_common()))


def test_a_kill_before_each_file_is_complete(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt is killed before it completes a file that no earlier attempt has completed; the
    only validation follows the last iteration."""
    monkeypatch.setattr(kills, "RECIPE", dataclasses.replace(kills.RECIPE, iterations=4))
    kind = Kind(1, 0, validates=True)
    expected, _ = undisturbed(kind, data, tmp_path / "expected")
    (trial := tmp_path / "trial").mkdir()
    (reached := tmp_path / "reached").mkdir()
    replace = Path.replace

    def killed(partial: Path, path: Path) -> Path:
        if not (place := reached / path.name).exists():
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(partial, path)

    monkeypatch.setattr(Path, "replace", killed)
    codes: list[int | None] = [-signal.SIGKILL]
    while codes == [-signal.SIGKILL]:
        codes = ended(kind, data, trial)
    assert codes == [0], (trial / "log.txt").read_text()
    assert contents(reached) == {Path(name).name for name in contents(expected)} - {".lock"}
    require_equal(trial / "run", expected, "killed before each file")
