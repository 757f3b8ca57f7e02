import pytest
import torch
from torch.utils.data import DataLoader

from deformnet.engine.sampling import Draws, DrawSampler


class Numbers:
    """Gives (index, a random number)."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.tensor(index), torch.rand(())


def everything(first=0, iterations=7, workers=0):
    loader = DataLoader(
        Draws(Numbers(), seed=3),
        batch_sampler=DrawSampler(first, iterations, batch=4),
        num_workers=workers,
    )
    indices, noise = zip(*loader, strict=True)
    return torch.cat(indices).tolist(), torch.cat(noise).tolist()


def test_every_epoch_shows_every_image_once():
    draws = Draws(Numbers(), seed=0)
    order = [draws.image_index(k) for k in range(50)]
    epochs = [tuple(order[i : i + 5]) for i in range(0, 50, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 5, "the order must change from epoch to epoch"


def test_seeds_differ():
    assert [Draws(Numbers(), 0).image_index(k) for k in range(20)] != [
        Draws(Numbers(), 1).image_index(k) for k in range(20)
    ]


def test_augmentation_differs_between_draws_of_one_image():
    indices, noise = everything()
    of_first = [n for i, n in zip(indices, noise, strict=True) if i == 0]
    assert len(of_first) > 4
    assert len(set(of_first)) == len(of_first)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_resumed_run_draws_the_rest(workers):
    indices, noise = everything()
    # In the middle of the second epoch of five images.
    assert everything(first=2, workers=workers) == (indices[8:], noise[8:])


@pytest.mark.parametrize(("images", "batch"), [(23, 4), (24, 4), (7, 3), (2, 4), (9, 1), (30, 8)])
def test_batches_are_of_one_group_but_where_an_epoch_ends(images, batch):
    groups = [int(number % 3 == 0) for number in range(images)]
    draws = Draws(range(images), 0, batch, groups)
    order = [draws.image_index(k) for k in range(12 * images)]
    for epoch in range(12):
        assert sorted(order[epoch * images : (epoch + 1) * images]) == list(range(images))
    for start in range(0, len(order) - batch + 1, batch):
        end = start + batch
        # Leftovers of both groups come at either end of an epoch: fewer than a batch of each.
        into, left = start % images, images - end % images
        if into >= 2 * batch and left >= 2 * batch and end % images > into:
            assert len({groups[index] for index in order[start:end]}) == 1
    assert order[:images] != order[images : 2 * images] or images < 3
    again = Draws(range(images), 0, batch, groups)
    assert [again.image_index(k) for k in range(images, 3 * images)] == order[images : 3 * images]


def test_drawing_leaves_the_callers_random_numbers_alone():
    draws = Draws(Numbers(), seed=0)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    draws[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_share_each_batch(processes):
    whole = list(DrawSampler(4, 9, batch=6))
    shares = [
        list(DrawSampler(4, 9, batch=6, rank=rank, processes=processes))
        for rank in range(processes)
    ]
    for iteration, batch in enumerate(whole):
        together = [draw for share in shares for draw in share[iteration]]
        assert sorted(together) == batch
        assert {len(share[iteration]) for share in shares} == {6 // processes}


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="batch 6 cannot be shared evenly by 4 processes"):
        DrawSampler(0, 1, batch=6, processes=4)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="empty"):
        Draws([], seed=0)
