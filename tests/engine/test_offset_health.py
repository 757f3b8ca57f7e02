"""Offsets that run away are seen while the model trains."""

import dataclasses
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from deformnet import DeformConv2d
from deformnet.analysis import OffsetObserver
from deformnet.nn import parameter_groups
from deformnet.recipes import FasterRCNNRecipe, RFCNRecipe
from deformnet.engine import train
from deformnet.engine.health import OffsetHealth

STEPS = 60


class Regression(pl.LightningModule):
    """Moves an image by a few pixels: a task for offsets."""

    def __init__(self, offset_lr_scale: float, lr: float = 0.02):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            DeformConv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            DeformConv2d(8, 3, 3, padding=1),
        )
        self.offset_lr_scale = offset_lr_scale
        self.lr = lr

    def training_step(self, images: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.net(images) - images.roll((1, 2), (2, 3))).abs().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.net, self.lr, offset_lr_scale=self.offset_lr_scale)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)


class EveryStep(pl.Callback):
    """Notes the first iteration in which a sample was moved beyond the map."""

    def __init__(self) -> None:
        self.first: int | None = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.observer = OffsetObserver(module)
        self.observer.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.observer.stop()
        if self.first is None and any(
            not layer.largest_shift <= layer.map_side for layer in self.observer.health()
        ):
            self.first = trainer.global_step


def fit(module, *callbacks, steps=STEPS, logger=False, accumulate=1):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(2 * steps * accumulate, 3, 4, 4, generator=generator)
    images = 3 * nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=5,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=2))
    return trainer, [str(w.message) for w in caught if "run away" in str(w.message)]


def test_a_run_that_diverges_is_reported_at_once():
    watch, health = EveryStep(), OffsetHealth(every=5)
    trainer, said = fit(Regression(offset_lr_scale=100), watch, health)
    assert len(said) == len(health.ran_away) >= 1  # once for each layer
    assert trainer.global_step == STEPS
    assert watch.first is not None
    first = min(int(text.split("iteration ")[1].split(":")[0]) for text in said)
    assert first - watch.first <= 50
    assert list(health.ran_away.values()) == said
    for text, name in zip(said, health.ran_away, strict=True):
        assert text.startswith(f"the offsets of {name} run away in iteration")
        assert "a lower offset_lr_scale, gradient clipping or a longer warm-up may help" in text
    assert set(health.ran_away) <= {"net.2", "net.4"}


def test_a_run_that_does_not_is_left_alone():
    health = OffsetHealth(every=5, stop=True)
    trainer, said = fit(Regression(offset_lr_scale=1), health)
    assert trainer.global_step == STEPS
    assert (said, health.ran_away, health.stopped) == ([], {}, False)


def test_it_can_stop_the_run():
    health = OffsetHealth(every=5, stop=True)
    module = Regression(offset_lr_scale=100)
    trainer, said = fit(module, health)
    assert health.stopped
    assert trainer.global_step == int(said[0].split("iteration ")[1].split(":")[0]) < STEPS
    assert not any(layer._forward_hooks for layer in module.modules())


class Notes(Logger):
    """Keeps what is logged."""

    name, version = "notes", ""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step + 1, {}).update(metrics)

    def log_hyperparams(self, *args):
        pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged_is_what_an_observer_sees(accumulate):
    """The iteration's own gradients and, with parts, all of its calls."""
    seen = {}

    class Watch(EveryStep):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx % accumulate == 0:
                super().on_train_batch_start(trainer, module, batch, batch_idx)

        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen[trainer.global_step + 1] = self.observer.health()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            pass

    notes = Notes()
    fit(Regression(1.0), OffsetHealth(5), Watch(), steps=12, logger=notes, accumulate=accumulate)
    rows = {step: row for step, row in notes.rows.items() if "offsets/net.2/outside" in row}
    assert sorted(rows) == [5, 10]
    for step, row in rows.items():
        for layer in seen[step]:
            for name in ("mean_shift", "largest_shift", "outside", "gradient_ratio"):
                logged = row[f"offsets/{layer.layer}/{name}"]
                assert logged == pytest.approx(getattr(layer, name), rel=1e-5)


class TwoOptimizers(Regression):
    """Trained by hand; each of its two halves makes a step with every batch."""

    def __init__(self):
        super().__init__(1.0)
        self.automatic_optimization = False
        self.halves = nn.ModuleList(DeformConv2d(3, 3, 3, padding=1) for _ in range(2))
        del self.net
        for half in self.halves:
            nn.init.constant_(half.conv_offset.bias, 100)

    def training_step(self, images, batch_idx):
        for half, optimizer in zip(self.halves, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(half(images).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(half.parameters(), lr=1e-3) for half in self.halves]


def test_several_optimizers_are_all_seen():
    health = OffsetHealth(every=10)
    fit(TwoOptimizers(), health, steps=20)
    assert set(health.ran_away) == {"halves.0", "halves.1"}
    assert all("in iteration 12: " in text for text in health.ran_away.values())


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(ValueError, match="every: wanted at least 1, got 0"):
        OffsetHealth(0)
    module = Regression(1.0)
    module.net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    with pytest.raises(ValueError, match="Regression has no deformable layer"):
        fit(module, OffsetHealth())


def diverging(quick):
    return dataclasses.replace(quick, deform_layers=3, offset_lr_scale=100, lr=0.05, iterations=40)


def test_training_warns_and_goes_on(shapes, quick, tmp_path):
    recipe = diverging(quick)
    with pytest.warns(UserWarning, match=r"offsets of model\.backbone\.layer4.* run away") as said:
        metrics = train(
            recipe, shapes, tmp_path / "run", val_split=None, log_every=2, progress=False
        )
    assert metrics["iterations"] == 40
    named = [str(one.message) for one in said if "run away" in str(one.message)]
    assert len(named) == len({text.split(" run away")[0] for text in named})  # once for each


def test_training_stops_when_asked_to(shapes, quick, tmp_path):
    recipe, run = diverging(quick), tmp_path / "run"
    with (
        pytest.warns(UserWarning, match="run away"),
        pytest.raises(FloatingPointError, match=r"run away in iteration \d+: .*; .*checkpoint"),
    ):
        train(recipe, shapes, run, log_every=2, stop_on_runaway=True, progress=False)
    assert not (run / "metrics.json").exists()


def test_a_run_at_rest_is_not_warned_of(shapes, quick, tmp_path, recwarn):
    train(quick, shapes, tmp_path / "run", val_split=None, log_every=2, progress=False)
    assert not [one for one in recwarn if "run away" in str(one.message)]


@pytest.mark.parametrize(
    ("network", "pools"),
    [(RFCNRecipe, ("score_pool", "box_pool")), (FasterRCNNRecipe, ("deform_pool",))],
)
def test_pooling_is_watched_where_it_alone_is_deformable(shapes, tmp_path, network, pools):
    recipe = network(
        backbone="resnet18",
        deform_layers=0,
        pool="deformable",
        short_side=48,
        anchor_sizes=(16, 32),
        proposals=20,
        iterations=2,
        batch=2,
        warmup=0,
    )
    run = tmp_path / "run"
    train(recipe, shapes, run, val_split=None, workers=0, log_every=1, progress=False)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = {tag for tag in events.Tags()["scalars"] if tag.startswith("offsets/")}
    names = ("mean_shift", "largest_shift", "outside")
    assert logged == {f"offsets/model.{pool}/{name}" for pool in pools for name in names}
    for pool in pools:
        first, second = events.Scalars(f"offsets/model.{pool}/largest_shift")
        assert first.value == 0 < second.value
