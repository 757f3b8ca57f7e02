"""Offsets that run away are detected while the model trains."""

import dataclasses
import warnings

import pytest
import torch
from processes import run, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from deformnet import DeformConv2d
from deformnet.analysis import OffsetObserver
from deformnet.engine import OffsetHealth
from deformnet.nn import parameter_groups
from deformnet.recipes import FasterRCNNRecipe, RFCNRecipe

STEPS = 60


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        DeformConv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        DeformConv2d(8, 3, 3, padding=1),
    )


def fit(offset_lr_scale, health_of, steps=STEPS, parts=1):
    """Learns to move an image by a few pixels, which is a task for offsets.

    Returns:
        health: the watch.
        warned: its warnings.
        seen: an observer's measurements in each iteration.
    """
    net = network()
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(2 * steps, 3, 4, 4, generator=generator)
    images = 3 * nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic")
    groups = parameter_groups(net, 0.02, offset_lr_scale=offset_lr_scale)
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    health, observer, seen = health_of(net), OffsetObserver(net), {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for iteration, batch in enumerate(images.split(2), start=1):
            optimizer.zero_grad()
            with health.watch(iteration), observer:
                for part in batch.chunk(parts):
                    loss = (net(part) - part.roll((1, 2), (2, 3))).abs().mean() / parts
                    loss.backward()
            seen[iteration] = observer.health(), health.scalars(), health.runaway()
            optimizer.step()
    assert not any(module._forward_hooks for module in net.modules())
    return health, [str(w.message) for w in caught if "run away" in str(w.message)], seen


def test_a_run_that_diverges_is_reported_at_once():
    health, warned, seen = fit(100, lambda net: OffsetHealth(net, every=5))
    assert len(warned) == len(health.messages) >= 1  # once for each layer
    left = [
        iteration
        for iteration, (layers, *_) in seen.items()
        if any(not layer.max_shift <= layer.map_size for layer in layers)
    ]
    first = min(int(text.split("iteration ")[1].split(":")[0]) for text in warned)
    assert first - left[0] <= 5
    assert seen[first][2]
    assert list(health.messages.values()) == warned
    for text, name in zip(warned, health.messages, strict=True):
        assert text.startswith(f"the offsets of {name} run away in iteration")
        assert "a lower offset_lr_scale, gradient clipping or a longer warm-up may help" in text
    assert set(health.messages) <= {"2", "4"}


def test_a_run_that_does_not_is_left_alone():
    health, warned, seen = fit(1, lambda net: OffsetHealth(net, every=5))
    assert (warned, health.messages) == ([], {})
    assert not any(runaway for *_, runaway in seen.values())


def test_other_processes_do_not_warn():
    health, warned, _ = fit(100, lambda net: OffsetHealth(net, every=5, warn=False))
    assert warned == []
    assert health.messages


@pytest.mark.parametrize("parts", [1, 2])
def test_scalars_are_the_measurements_of_an_observer(parts):
    """Gradients of the iteration alone and, with parts, all of its calls."""
    _, _, seen = fit(1, lambda net: OffsetHealth(net, every=5), steps=12, parts=parts)
    assert [iteration for iteration, (_, scalars, _) in seen.items() if scalars] == [5, 10]
    for iteration in (5, 10):
        layers, scalars, _ = seen[iteration]
        assert {name.split("/")[1] for name in scalars} == {"2", "4"}
        for layer in layers:
            for name in ("mean_shift", "max_shift", "outside", "gradient_ratio"):
                assert scalars[f"offsets/{layer.layer}/{name}"] == getattr(layer, name)


def test_models_that_cannot_be_watched_are_refused():
    with pytest.raises(ValueError, match="expected every to be at least 1, but got 0"):
        OffsetHealth(network(), 0)
    with pytest.raises(ValueError, match=r"to have a deformable layer, .* but Sequential has none"):
        OffsetHealth(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)))


def diverging(quick):
    changes = {"backbone": "resnet18", "deform_layers": 3, "offset_lr_scale": 100}
    return dataclasses.replace(quick, **changes, lr=0.05, iterations=40)


def test_training_warns_and_goes_on(shapes, quick, tmp_path):
    recipe = diverging(quick)
    with pytest.warns(UserWarning, match=r"offsets of backbone\.layer4.* run away") as warned:
        result = run(recipe, shapes, tmp_path / "run", log_every=2)
    assert result.iterations == 40
    named = [str(one.message) for one in warned if "run away" in str(one.message)]
    assert len(named) == len({text.split(" run away")[0] for text in named})  # once for each


def test_training_stops_when_asked_to(shapes, quick, tmp_path):
    out = tmp_path / "run"
    with (
        pytest.warns(UserWarning, match="run away"),
        pytest.raises(FloatingPointError, match=r"run away in iteration \d+: .*; .*checkpoint"),
    ):
        run(diverging(quick), shapes, out, log_every=2, stop_on_runaway=True)
    assert not (out / "metrics.json").exists()


def test_a_run_at_rest_is_not_warned_of(shapes, quick, tmp_path, recwarn):
    run(quick, shapes, tmp_path / "run", log_every=2)
    assert not [one for one in recwarn if "run away" in str(one.message)]


@pytest.mark.parametrize(
    ("network", "pools"),
    [(RFCNRecipe, ("score_pool", "box_pool")), (FasterRCNNRecipe, ("deform_pool",))],
)
def test_pooling_is_watched_where_it_alone_is_deformable(shapes, tmp_path, network, pools):
    # The features of the tiny ResNet are too small to move the bins.
    changes = {"backbone": "resnet18", "deform_layers": 0, "pool": "deformable"}
    recipe = small(network, **changes, batch=2, iterations=2)
    run(recipe, shapes, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = {tag for tag in events.Tags()["scalars"] if tag.startswith("offsets/")}
    names = ("mean_shift", "max_shift", "outside")
    assert logged == {f"offsets/{pool}/{name}" for pool in pools for name in names}
    for pool in pools:
        first, second = events.Scalars(f"offsets/{pool}/max_shift")
        assert first.value == 0 < second.value
