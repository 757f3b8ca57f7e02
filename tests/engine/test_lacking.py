"""Missing memory, ports and run folders are reported in one line, never as a traceback."""

import re
import shutil
import socket
from unittest.mock import Mock

import pytest
import torch
from processes import LIMIT, after_step

import deformnet.engine
import forks
from deformnet.cli import main

QUICK = [
    *("--recipe", "scratch"),
    *("--backbone", "resnet18", "--deform-layers", "1", "--short-side", "32", "--max-side", "None"),
    *("--batch", "2", "--iterations", "4", "--accelerator", "cpu", "--workers", "0"),
    *("--checkpoint-every", "1", "--log-every", "1"),
]


@pytest.fixture
def command(shapes, tmp_path):
    return ["train", "deeplab", *QUICK, "--data", str(shapes), "--out", str(tmp_path / "run")]


def end_of(*words, folder, **environment):
    """The exit code of a program, and what it prints."""
    program = forks.command(*words, printed=folder / "printed.txt", **environment)
    printed, _ = program.communicate(LIMIT)
    return program.returncode, printed


def no_memory(*arguments, **options):
    torch.empty(2**60, dtype=torch.uint8)


def no_port(*arguments, **options):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        torch.distributed.TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True)


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a ...")
GLOO = RuntimeError("Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: ...")
WORKER = "DataLoader worker (pid 77) is killed by signal: {}. {}"
KILLED = RuntimeError(WORKER.format("Killed", ""))
BUS = RuntimeError(WORKER.format("Bus error", "It is possible that dataloader's workers are ..."))
CRASH = RuntimeError(WORKER.format("Segmentation fault", ""))
SILENT = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation")


TOO_LARGE = "too large for the memory of this machine"
IN_LOADER = "Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback: ..."
NO_MEMORY = "out of memory; --accumulate 2 processes each training batch in two parts"


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        (no_memory, NO_MEMORY),
        (GPU, NO_MEMORY),
        (MemoryError(), NO_MEMORY),
        (RuntimeError("could not create a primitive"), NO_MEMORY),
        (RuntimeError("std::bad_alloc"), NO_MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), NO_MEMORY),
        (MemoryError(f"a.xml: {TOO_LARGE}"), f"a.xml: {TOO_LARGE}"),
        (MemoryError(f"{IN_LOADER}\nMemoryError: a.jpg: {TOO_LARGE}"), f"a.jpg: {TOO_LARGE}"),
        (no_port, "port 29777 is in use; choose another one with torchrun --master-port"),
        (GLOO, "the processes of this run cannot connect to each other; for several machines"),
        (KILLED, "a data loading process was killed, probably out of memory; use fewer"),
        (BUS, "out of shared memory; start the container with --shm-size=2g, or use --workers 0"),
        (TimeoutError("number 3: expected the loader worker"), "number 3: expected the"),
    ],
)
def test_what_is_lacking_is_said_in_one_line(command, complaint, monkeypatch, lack, said):
    monkeypatch.setattr(deformnet.engine, "train", Mock(side_effect=lack))
    monkeypatch.setenv("MASTER_PORT", "29777")
    assert said in complaint(*command)


@pytest.mark.parametrize(
    ("failed", "said"),
    [
        (CRASH, "a data loading process exited unexpectedly (DataLoader worker (pid 77) is "),
        (SILENT, "another process of this run did not respond in time (see the warnings above)"),
    ],
)
def test_other_processes_that_fail(command, capfd, monkeypatch, failed, said):
    monkeypatch.setattr(deformnet.engine, "train", Mock(side_effect=failed))
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    assert capfd.readouterr().err.startswith(f"deformnet: {said}")


def test_other_mistakes_keep_their_stack_trace(command, monkeypatch):
    def train(*arguments, **options):
        torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr(deformnet.engine, "train", train)
    with pytest.raises(RuntimeError, match="size"):
        main(command)


def test_operations_that_onednn_lacks_are_not_a_lack_of_memory(command, monkeypatch):
    lack = RuntimeError("could not create a primitive descriptor for the matmul primitive")
    monkeypatch.setattr(deformnet.engine, "train", Mock(side_effect=lack))
    with pytest.raises(RuntimeError, match="matmul"):
        main(command)


@pytest.mark.parametrize("becomes", ["nothing", "a file"])
def test_a_run_folder_that_vanishes(command, complaint, tmp_path, monkeypatch, becomes):
    """Its disk was unplugged, say."""

    def remove():
        shutil.rmtree(tmp_path / "run")
        if becomes == "a file":
            (tmp_path / "run").touch()

    after_step(2, remove, monkeypatch)
    line = complaint(*command)
    assert line.startswith(str(tmp_path / "run"))
    assert re.search("No such file or directory|Not a directory|File exists", line), line


def test_a_port_in_use(command, tmp_path):
    """As a launcher that sets the environment, such as SLURM, runs into it."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
        code, printed = end_of(*command, "--devices", "2", folder=tmp_path, **launched)
    lines = [line for line in printed.splitlines() if line.startswith("deformnet: ")]
    assert code == 2, printed
    assert lines == [
        f"deformnet: port {port} is in use; choose another one with torchrun --master-port or the "
        "environment variable MASTER_PORT"
    ]
    assert "Traceback" not in printed


def test_an_unreadable_image_ends_the_program(command, shapes, tmp_path):
    """At once, though processes that load images are left then."""
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    for image in (data / "VOCdevkit/VOC2012/JPEGImages").glob("train_*.jpg"):
        image.write_bytes(image.read_bytes()[:600])
    code, printed = end_of(*command, "--workers", "2", "--data", data, folder=tmp_path)
    assert code == 2, printed
    assert f"deformnet: {data}" in printed
    assert "Traceback" not in printed
