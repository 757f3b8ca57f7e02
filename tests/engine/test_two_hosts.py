"""Two torchruns are one run: on one machine, and between hosts that have only a wire in common."""

import json
import os
import shutil
import signal
import socket
import subprocess

import pytest
import torch
from processes import RECIPES, curve, forked_torchrun, run, start, wait, write_images

NAME = "deeplab"

# Two network namespaces, joined by a pair of virtual cards, of the two processes that it prints.
HOSTS = """
set -e
unshare --net sleep 300 &
other=$!
trap "kill $other" EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add first type veth peer name second netns $other
ip address add 10.77.0.1/24 dev first
ip link set first up
ip link set lo up
there="nsenter --target $other --net"
$there ip address add 10.77.0.2/24 dev second
$there ip link set second up
$there ip link set lo up
echo $$ $other
wait $other
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The data, and a run of one process on it, scored."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    write_images(folder / "data")
    run(RECIPES[NAME], folder / "data", folder / "run", val_split="val")
    return folder


@pytest.fixture
def jobs(alone, tmp_path):
    job = {"recipe": RECIPES[NAME].to_dict(), "data": alone / "data", "out": tmp_path / "run"}
    return [{"do": "train", **job, "options": {"val_split": "val"}}]


def assert_as_alone(alone, out):
    assert curve(out) == pytest.approx(curve(alone / "run"), rel=1e-5)
    scores = [json.loads((where / "metrics.json").read_text()) for where in (alone / "run", out)]
    assert scores[1]["mean_iou"] == pytest.approx(scores[0]["mean_iou"], abs=1e-3)


def test_two_torchruns_on_one_machine(alone, jobs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={place}", "--rdzv-id=test")
    wait(*(forked_torchrun(jobs, tmp_path, *options) for _ in range(2)))
    assert_as_alone(alone, tmp_path / "run")


def test_two_hosts(alone, jobs, tmp_path):
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("no unshare or no ip: hosts cannot be made")
    new = ["unshare", "--user", "--map-root-user", "--net"]
    probe = [*new, "ip", "link", "add", "first", "type", "veth", "peer", "name", "second"]
    made = subprocess.run(probe, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"this machine allows no hosts of one's own: {made.stderr.strip()}")
    hosts = start([*new, "sh", "-c", HOSTS])
    try:
        runs = []
        for rank, host in enumerate(map(int, hosts.stdout.readline().split())):
            node = (f"--node-rank={rank}", "--master-addr=10.77.0.1", "--master-port=29500")
            card = {"GLOO_SOCKET_IFNAME": ("first", "second")[rank]}
            runs.append(forked_torchrun(jobs, tmp_path, "--nnodes=2", *node, host=host, **card))
        assert len(runs) == 2
        wait(*runs)
    finally:
        os.killpg(hosts.pid, signal.SIGKILL)
        hosts.communicate()
    assert_as_alone(alone, tmp_path / "run")
