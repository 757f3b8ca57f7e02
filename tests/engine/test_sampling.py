"""The order of training images, however it is loaded and divided."""

import pytest
import torch

from deformnet.data.workers import loaded
from deformnet.engine.sampling import Draws, Iterations
from deformnet.recipes import DeepLabRecipe
from deformnet.tasks.base import seeded

RECIPE = DeepLabRecipe(batch=4, seed=3)


class Numbers:
    """A training set of five images that gives (index, a random number) for each."""

    groups = None

    def __len__(self):
        return 5

    def batch(self, indices, seeds):
        return seeded(lambda index: (index, float(torch.rand(()))), indices, seeds)


def everything(first=0, end=7, workers=0, **division):
    iterations = Iterations(Numbers(), RECIPE, **division)
    batches = loaded(iterations, range(first, end), workers=workers, what=str)
    samples = [sample for parts in batches for part in parts for sample in part]
    indices, noise = zip(*samples, strict=True)
    return list(indices), list(noise)


def test_every_epoch_shows_every_image_once():
    draws = Draws(5, seed=0)
    order = [draws.image_index(k) for k in range(50)]
    epochs = [tuple(order[i : i + 5]) for i in range(0, 50, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 5, "the order must change from epoch to epoch"


def test_seeds_differ():
    assert [Draws(5, 0).image_index(k) for k in range(20)] != [
        Draws(5, 1).image_index(k) for k in range(20)
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
    draws = Draws(images, 0, batch, groups)
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
    again = Draws(images, 0, batch, groups)
    assert [again.image_index(k) for k in range(images, 3 * images)] == order[images : 3 * images]


def test_drawing_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Iterations(Numbers(), RECIPE)[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("processes", "parts"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_parts_divide_each_batch(processes, parts):
    divided = [Iterations(Numbers(), RECIPE, parts, rank, processes) for rank in range(processes)]
    for iteration in range(9):
        (whole,) = Iterations(Numbers(), RECIPE)[iteration]
        batches = [each[iteration] for each in divided]
        assert {len(part) for batch in batches for part in batch} == {4 // processes // parts}
        samples = [sample for batch in batches for part in batch for sample in part]
        assert sorted(samples) == sorted(whole)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="the data set is empty"):
        Draws(0, seed=0)
