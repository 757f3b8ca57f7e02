"""benchmarks/claim at the size of a toy: what varies, what is equal, what is reported."""

import json
import math
from dataclasses import replace

import pytest
import torch
from benchmarks.claim import __main__ as command
from benchmarks.claim import control, report, training
from benchmarks.claim.plan import (
    BUDGETS,
    CONTROL_VARIANTS,
    DILATION,
    NETWORKS,
    VARIANTS,
    Job,
    Run,
    control_runs,
    runs,
    tuning_jobs,
)
from benchmarks.claim.report import SIZES, summarize

from deformnet.models import Target

TOY = {name: replace(b, side=32, images=4, test=2, steps=2, batch=2) for name, b in BUDGETS.items()}
LAYERS = ("layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2")
NECK = ("neck.1.conv", "neck.2.conv", "neck.3.conv")


def made_result(run, score):
    """A result with a dilation of its own for each seed and layer; no small objects."""
    spread = {"count": 5, "std": 0.1}
    dilation = [
        {
            "layer": layer,
            "small": {"count": 0, "mean": None, "std": None},
            "medium": spread | {"mean": 1.0 + i + run.seed},
            "large": spread | {"mean": 2.0 + i + run.seed},
            "background": spread | {"mean": 1.5 + i + run.seed},
        }
        for i, layer in enumerate(LAYERS)
    ]
    return {
        "run": run._asdict(),
        "score": score,
        "seconds per step": 0.1,
        "dilation": dilation if run.variant == "deformable" else None,
    }


def made_results():
    """Deformable is better by 10 * strength + seed."""
    found = []
    for run in runs((0, 0.5, 1), (0, 2)):
        more = 10 * run.strength + run.seed if run.variant == "deformable" else 0
        found.append(made_result(run, 40 - run.strength + more))
    return found


def test_strengths_change_warp_and_range_of_sizes_alone():
    budget = BUDGETS["deeplab"]
    sets = [training.shapes(strength, budget) for strength in (0, 1 / 3, 2 / 3, 1)]
    ranges = [one.radius for one in sets]
    for low, high in ranges:
        assert math.sqrt(low * high) == pytest.approx(training.MEAN_RADIUS)
    widths = [math.log(high / low) for low, high in ranges]
    assert widths == pytest.approx([0, widths[3] / 3, 2 * widths[3] / 3, widths[3]])
    assert [one.warp for one in sets] == [0, 1 / 3, 2 / 3, 1]
    assert len({replace(one, warp=0, radius=(0.1, 0.2)) for one in sets}) == 1


def test_warp_alone_and_size_alone():
    warp, size, both = (
        training.shapes(1, BUDGETS["deeplab"], varied) for varied in ("warp", "size", "both")
    )
    assert warp == replace(both, radius=(training.MEAN_RADIUS, training.MEAN_RADIUS))
    assert size == replace(both, warp=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_both_networks_begin_as_the_same_function(network):
    images = training.make_images(training.shapes(1, TOY[network]), "val")
    outputs = []
    for variant in VARIANTS:
        torch.manual_seed(3)
        model = training.build(network, variant).eval()
        pixels = training.normalized(images.pixels, network)
        if network != "rfcn":
            outputs.append(model(pixels))
        else:
            outputs.append(torch.cat([c.scores for c in model(pixels, [(32, 32)] * 2)]))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("network", NETWORKS)
def test_dilated_networks_differ_in_three_layers_alone(network):
    plain, dilated = (
        training.build(network, variant).backbone for variant in ("plain", "dilation4")
    )
    changed = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Conv2d)
        and module.dilation != dilated.get_submodule(name).dilation
    ]
    assert changed == list(NECK if network == "deeplab-lite0" else LAYERS)
    for name in changed:
        conv = dilated.get_submodule(name)
        assert (conv.dilation, conv.padding, conv.stride) == ((4, 4), (4, 4), (1, 1))
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in dilated.state_dict().items()
    }


def test_pixels_are_normalized_as_the_weights_expect():
    pixels = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    means, stds = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    found = training.normalized(pixels, "deeplab-lite0").flatten()
    torch.testing.assert_close(found, (1 - means) / stds)
    assert training.normalized(pixels, "deeplab").flatten().tolist() == [127 / 64] * 3


def test_batches_are_those_of_the_seed_and_flip_all_alike():
    budget = replace(TOY["deeplab"], steps=4)
    images = training.make_images(training.shapes(1, budget), "train")
    first, again, other = (list(training.batches(images, budget, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    for _, labels, targets in first:
        for one, target in zip(labels, targets, strict=True):
            for (x1, y1, x2, y2), label in zip(target.boxes.int(), target.labels, strict=True):
                shown = one == label + 1
                assert shown[y1:y2, x1].any()
                assert shown[y1:y2, x2 - 1].any()


def test_flipped_boxes():
    target = Target(torch.tensor([[1.0, 2, 4, 8]]), torch.tensor([3]))
    assert training.flipped(target, 10).boxes.tolist() == [[6, 2, 9, 8]]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_is_trained_once(network, tmp_path, monkeypatch):
    job = Job(Run(network, "deformable", 1.0, 0), TOY[network])
    found = training.result(job, tmp_path)
    assert 0 <= found["score"] <= 100
    layers = NECK if network == "deeplab-lite0" else LAYERS
    assert [row["layer"] for row in found["dilation"]] == list(layers)
    assert (tmp_path / "features").is_dir() == (network == "deeplab-lite0")
    monkeypatch.setattr(training, "train", None)
    assert training.result(job, tmp_path) == found
    with pytest.raises(ValueError, match=r"strength1-seed0.json: expected a run of .*'steps': 3"):
        training.result(job._replace(budget=replace(job.budget, steps=3)), tmp_path)


def test_the_frozen_network_keeps_its_weights_and_the_neck_trains(tmp_path):
    job = Job(Run("deeplab-lite0", "plain", 1.0, 0), TOY["deeplab-lite0"])
    model = training.build("deeplab-lite0", "plain")
    start = {name: value.clone() for name, value in model.backbone.base.state_dict().items()}
    trained, _ = training.train(job.run, job.budget, tmp_path)
    for name, value in trained.backbone.base.state_dict().items():
        assert torch.equal(value, start[name])
    assert trained.backbone.neck[1].norm.num_batches_tracked == job.budget.steps


def test_the_gap_pairs_seeds_and_leaves_out_what_is_half_done():
    results = made_results()
    unfinished = Run("deeplab", "deformable", 1, 2)
    results = [one for one in results if Run(**one["run"]) != unfinished]
    rows = summarize(results, "deeplab")
    assert [row["strength"] for row in rows] == [0, 0.5, 1]
    assert rows[1]["gap"] == {"seeds": {"0": 5, "2": 7}, "mean": 6, "std": pytest.approx(2**0.5)}
    assert rows[2]["plain"] == {"seeds": {"0": 39}, "mean": 39, "std": None}
    dilation = rows[1]["dilation"]["layer4.1.conv1"]
    assert dilation["small"] is None
    assert dilation["large"]["seeds"] == {"0": 3, "2": 5}
    assert dilation["large"]["filters"] == 5
    assert [row["strength"] for row in summarize(results, "rfcn")] == [0, 1]


def test_the_figure_shows_the_numbers_of_the_file(tmp_path, monkeypatch):
    drawn, draw = [], report.draw

    def draw_and_keep(summary):
        drawn.append(draw(summary))
        return drawn[-1]

    monkeypatch.setattr(report, "draw", draw_and_keep)
    printed = report.report(made_results(), {"machine": "a desk"}, tmp_path)
    summary = json.loads((tmp_path / "claim.json").read_text())["summary"]
    assert (tmp_path / "claim.png").read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    for place, network in enumerate(("deeplab", "rfcn")):
        rows = summary[network]
        scores, gap, dilation = panels[3 * place : 3 * place + 3]
        for line, name in ((scores, "plain"), (gap, "gap")):
            assert line.lines[0].get_ydata().tolist() == [row[name]["mean"] for row in rows]
        for line, sizes in zip(dilation.containers, rows[-1]["dilation"].values(), strict=True):
            shown = [sizes[size]["mean"] for size in SIZES if sizes[size]]
            assert line.lines[0].get_ydata().tolist() == shown
    assert "| 0.5 | 39.5, 39.5 (39.5 +- 0.0) | 44.5, 46.5 (45.5 +- 1.4) | 5.0, 7.0" in printed
    assert "| 1 | layer4.0.conv2 | - | 2.00 +- 1.41 | 3.00 +- 1.41 | 2.50 +- 1.41 |" in printed


def test_runs_come_in_pairs_seed_by_seed():
    order = runs((0, 0.5, 1), (0, 1))
    assert len(order) == 2 * (3 + 2) * 2
    assert {run.seed for run in order[:10]} == {0}
    assert {run.strength for run in order if run.network == "rfcn"} == {0, 1}
    # A pair is complete before the next begins.
    assert all(a[2:] == b[2:] for a, b in zip(order[::2], order[1::2], strict=True))


def test_a_fraction_of_the_iterations(tmp_path, monkeypatch):
    steps = {}

    def note(job, out):
        steps[job.run.network] = job.budget.steps
        return made_result(job.run, 50)

    monkeypatch.setattr(command, "result", note)
    call = ["claim", str(tmp_path), "--strengths", "1", "--seeds", "0", "--fraction"]
    monkeypatch.setattr("sys.argv", [*call, "0.3333"])
    command.main()
    assert steps == {"deeplab": 400, "rfcn": 600}


@pytest.mark.parametrize("fraction", ["0", "-1", "nan", "inf"])
def test_invalid_fractions(tmp_path, monkeypatch, capsys, fraction):
    monkeypatch.setattr("sys.argv", ["claim", str(tmp_path), f"--fraction={fraction}"])
    with pytest.raises(SystemExit):
        command.main()
    assert "argument --fraction: expected" in capsys.readouterr().err


def made_control():
    """Deformable is best with warp alone, dilated with size alone in one of two seeds."""
    more = {
        ("warp", "dilation2"): (1, 2),
        ("warp", "deformable"): (3, 5),
        ("size", "dilation2"): (2, -1),
        ("size", "deformable"): (1, 1),
    }
    return [
        made_result(run, 50 + more.get((run.varied, run.variant), (0, 0))[run.seed])
        | {"core seconds": 30}
        for run in control_runs(1, (0, 1))
    ]


def test_the_control_pairs_seeds_and_checks_its_statements(tmp_path):
    results = [one for one in made_control() if one["run"]["varied"] != "both"]
    printed = control.report(results, {"machine": "a desk"}, tmp_path)
    assert (
        "| warp alone | 50.0, 50.0 (50.0 +- 0.0) | 51.0, 52.0 (51.5 +- 0.7) "
        "| 53.0, 55.0 (54.0 +- 1.4) | 1.0, 2.0 (1.5 +- 0.7) | 3.0, 5.0 (4.0 +- 1.4) "
        "| 2.0, 3.0 (2.5 +- 0.7) |"
    ) in printed
    stored = json.loads((tmp_path / "control.json").read_text())
    assert stored["machine"] == "a desk"
    assert [row["varied"] for row in stored["summary"]["deeplab-lite0"]] == ["warp", "size"]
    of_warp, of_size, dilation = stored["statements"]["deeplab-lite0"]
    assert of_warp["holds"]
    assert of_warp["numbers"] == (
        "4.0 +- 1.4 (2 of 2 seeds) over plain, 2.5 +- 0.7 (2 of 2 seeds) over dilation2"
    )
    assert of_size["holds"] is None  # behind the dilated network in one of two seeds
    assert dilation["holds"] is None
    assert dilation["numbers"] == "0.5 +- 2.1 (1 of 2 seeds)"
    assert str(control.Statement(**dilation)).startswith("- **not clear**: size alone: the dil")


def test_an_unfinished_control_states_nothing(tmp_path):
    printed = control.report(made_control()[:2], {}, tmp_path)  # plain and dilated, warp alone
    assert "holds" not in printed
    assert "| 51.0 (51.0) | - | 1.0 (1.0) | - | - |" in printed


def test_runs_of_the_control():
    order = control_runs(1, (0, 1))
    assert len(order) == 2 * 3 * 3
    assert [run.variant for run in order[:3]] == list(CONTROL_VARIANTS)
    assert all(a[2:] == b[2:] for a, b in zip(order[::3], order[2::3], strict=True))
    assert len({run.name for run in order}) == len(order)
    # Those in which both vary are also runs of the claim.
    claims = runs((1,), (0, 1), ("deeplab-lite0",))
    assert set(claims) < set(order)


def test_settings_are_chosen_on_other_images():
    jobs = tuning_jobs(1, BUDGETS, ("deeplab-lite0",))
    assert {job.run.variant for job in jobs} == set(DILATION)
    scored = BUDGETS["deeplab-lite0"].data_seed
    assert all(job.budget.data_seed != scored for job in jobs)
    assert len({(job.folder, job.run.name) for job in jobs}) == len(jobs)


@pytest.mark.parametrize("part", ["control", "tuning"])
def test_parts_of_the_command(tmp_path, monkeypatch, capsys, part):
    called = []

    def note(job, out):
        called.append(job)
        return made_result(job.run, 50) | {"core seconds": 30, "budget": vars(job.budget)}

    monkeypatch.setattr(command, "result", note)
    monkeypatch.setattr("sys.argv", ["claim", str(tmp_path), "--part", part, "--seeds", "0"])
    command.main()
    jobs = {"control": 9, "tuning": len(tuning_jobs(1, BUDGETS, ("deeplab-lite0",)))}
    assert len(called) == jobs[part]
    assert {job.run.network for job in called} == {"deeplab-lite0"}
    assert "50.0" in capsys.readouterr().out
    assert (tmp_path / "control.json").is_file() == (part == "control")
