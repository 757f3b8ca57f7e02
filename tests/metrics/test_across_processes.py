"""Counts of two processes add up to those of one."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deformnet.metrics import ObjectCounts, confusion_matrix


def _count(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        pairs = torch.load(f"{folder}/pairs.pt", weights_only=True)
        metrics = confusion_matrix(4), ObjectCounts(4, small=4, large=9)
        for prediction, target in pairs[rank::2]:
            for metric in metrics:
                metric.update(prediction, target)
        torch.save([metric.compute() for metric in metrics], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    # Images of several sizes, and an odd number of them.
    pairs = [
        tuple(torch.randint(0, 4, (1, 8 + i, 12), generator=generator) for _ in range(2))
        for i in range(5)
    ]
    torch.save(pairs, tmp_path / "pairs.pt")
    mp.spawn(_count, (str(tmp_path),), nprocs=2)
    metrics = confusion_matrix(4), ObjectCounts(4, small=4, large=9)
    for prediction, target in pairs:
        for metric in metrics:
            metric.update(prediction, target)
    for rank in range(2):
        counts = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for metric, counted in zip(metrics, counts, strict=True):
            assert torch.equal(counted, metric.compute())
