"""benchmarks/claim at the size of a toy: what varies, what is equal, what is reported."""

import json
import math
from dataclasses import replace

import pytest
import torch
from benchmarks.claim import __main__ as command
from benchmarks.claim import report, training
from benchmarks.claim.plan import BUDGETS, NETWORKS, VARIANTS, Run, runs
from benchmarks.claim.report import SIZES, summarize

from deformnet.models import Target

TOY = {name: replace(b, side=32, images=4, test=2, steps=2, batch=2) for name, b in BUDGETS.items()}
LAYERS = ("layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2")


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


@pytest.mark.parametrize("network", NETWORKS)
def test_both_networks_begin_as_the_same_function(network):
    images = training.make_images(training.shapes(1, TOY[network]), "val")
    outputs = []
    for variant in VARIANTS:
        torch.manual_seed(3)
        model = training.build(network, variant).eval()
        pixels = training.normalized(images.pixels)
        if network == "deeplab":
            outputs.append(model(pixels))
        else:
            outputs.append(torch.cat([c.scores for c in model(pixels, [(32, 32)] * 2)]))
    torch.testing.assert_close(*outputs)


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
    run, budget = Run(network, "deformable", 1.0, 0), TOY[network]
    found = training.result(run, budget, tmp_path)
    assert 0 <= found["score"] <= 100
    assert [row["layer"] for row in found["dilation"]] == list(LAYERS)
    monkeypatch.setattr(training, "train", None)
    assert training.result(run, budget, tmp_path) == found
    with pytest.raises(ValueError, match=r"strength1-seed0.json: expected a run of .*'steps': 3"):
        training.result(run, replace(budget, steps=3), tmp_path)


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
    for place, network in enumerate(NETWORKS):
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

    def note(run, budget, out):
        steps[run.network] = budget.steps
        return made_result(run, 50)

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
