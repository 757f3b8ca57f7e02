"""Counts of two processes add up to those of one."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deformnet.metrics import ClassificationCounts, ConfusionMatrix, ObjectCounts


def _counts(folder: str | Path, rank: int, processes: int) -> list[torch.Tensor]:
    """Counts of every metric over the images of one process."""
    maps, classes = torch.load(f"{folder}/pairs.pt", weights_only=True)
    by_pixel = ConfusionMatrix(4), ObjectCounts(4, small=4, large=9)
    by_image = ClassificationCounts(8)
    for prediction, target in maps[rank::processes]:
        for metric in by_pixel:
            metric.update(prediction, target)
    by_image.update(*(part[rank::processes] for part in classes))
    return [metric.compute() for metric in (*by_pixel, by_image)]


def _count(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(_counts(folder, rank, 2), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    # Images of several sizes, and an odd number of them.
    maps = [
        tuple(torch.randint(0, 4, (1, 8 + i, 12), generator=generator) for _ in range(2))
        for i in range(5)
    ]
    logits = torch.randn(21, 8, generator=generator)
    classes = logits, torch.randint(8, (21,), generator=generator)
    torch.save((maps, classes), tmp_path / "pairs.pt")
    mp.spawn(_count, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for counts, expected in zip(shared, _counts(tmp_path, 0, 1), strict=True):
            assert torch.equal(counts, expected)
