"""The rows of the paper's tables as recipes."""

import re
from collections import defaultdict

import pytest

from deformnet.paper.listing import describe_row, list_rows
from deformnet.paper.rows import COCO, ROWS, find_rows
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    TestTimeAugmentation,
)

TRAINED = [row for row in ROWS if row.recipe is not None]


def named(name):
    (row,) = find_rows([name])
    return row


def test_rows_cover_the_tables():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    counted = defaultdict(int)
    for name in names:
        counted[name.split("/")[0]] += 1
    # Table 1: 5 numbers of layers, 5 networks and data sets. Table 3: 3 dilations, the default and
    # deformable convolution for each of these, and pooling, alone or not, for two. Table 5: seven
    # pairs. Table 7: three networks.
    assert counted == {"table1": 25, "table3": 25 + 4, "table5": 14, "table7": 3}


def test_rows_with_the_same_training_share_a_run():
    recipes = defaultdict(set)
    for row in TRAINED:
        recipes[row.run].add((row.recipe, row.data, row.fixed_proposals, row.starts_from))
    assert all(len(found) == 1 for found in recipes.values())
    assert len({recipe for (recipe,) in recipes.values()}) == len(recipes)
    assert named("table1/rfcn-3").run == named("table3/rfcn-conv").run
    assert named("table1/rfcn-0").run == named("table3/rfcn-atrous-2").run
    assert named("table5/rfcn-aligned-plain").run == named("table5/rfcn-aligned-plain-m-b").run


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_settings_common_to_all_rows_match_the_paper(row):
    recipe = row.recipe
    if isinstance(recipe, ClassifierRecipe):
        # He et al. 2016, section 3.4.
        assert (recipe.batch, recipe.lr, recipe.iterations) == (256, 0.1, 600_000)
        assert (recipe.weight_decay, recipe.momentum, recipe.norm) == (1e-4, 0.9, "trained")
        return
    assert (recipe.batch, recipe.lr, recipe.norm) == (8, 1e-3, "frozen")
    assert recipe.offset_groups == 1
    assert not recipe.modulated
    assert recipe.lr_factor(recipe.iterations * 2 // 3 - 1) == 1.0
    assert recipe.lr_factor(recipe.iterations * 2 // 3) == 0.1
    expected = {
        "voc-seg": (30_000, 360),
        "cityscapes": (45_000, 1024),
        "voc": (30_000, 600),
        "coco": (240_000, 600),
    }
    assert (recipe.iterations, recipe.short_side) == expected[row.data.key]
    if isinstance(recipe, (FasterRCNNRecipe, RFCNRecipe)):
        assert recipe.bins == 7
        # "To facilitate the ablation experiments on VOC, ... fixed RPN proposals"
        assert row.fixed_proposals == (row.data.key == "voc")


@pytest.mark.parametrize(
    ("name", "kind", "layers", "dilation", "pool", "paper"),
    [
        ("table1/deeplab-voc-2", DeepLabRecipe, 2, 2, None, {"mean IoU": 74.8}),
        ("table1/class-aware-rpn-6", ClassAwareRPNRecipe, 6, 2, None, (74.6, 57.7)),
        ("table1/faster-rcnn-0", FasterRCNNRecipe, 0, 2, "max", (78.1, 62.1)),
        ("table1/rfcn-3", RFCNRecipe, 3, 2, "average", (81.4, 64.7)),
        ("table3/deeplab-cityscapes-atrous-6", DeepLabRecipe, 0, 6, None, {"mean IoU": 72.7}),
        ("table3/rfcn-atrous-8", RFCNRecipe, 0, 8, "average", (80.3, 63.2)),
        ("table3/faster-rcnn-pool", FasterRCNNRecipe, 0, 2, "deformable", (78.3, 66.6)),
        ("table3/rfcn-conv-pool", RFCNRecipe, 3, 2, "deformable", (82.6, 68.5)),
        ("table5/rfcn-deformable", RFCNRecipe, 3, 2, "deformable", None),
        ("table5/faster-rcnn-aligned-plain", FasterRCNNRecipe, 0, 2, "max", None),
    ],
)
def test_rows_match_their_names(name, kind, layers, dilation, pool, paper):
    row = named(name)
    assert type(row.recipe) is kind
    assert (row.recipe.deform_layers, row.recipe.dilation) == (layers, dilation)
    assert getattr(row.recipe, "pool", None) == pool
    if isinstance(paper, tuple):
        paper = dict(zip(("mAP@0.5", "mAP@0.7"), paper, strict=True))
    if paper is not None:
        assert row.paper == paper


def test_last_rows_of_table_5_differ_only_in_augmentation():
    once, many, averaged = (
        named(f"table5/rfcn-aligned-deformable{testing}") for testing in ("", "-m", "-m-b")
    )
    assert once.augmentation == TestTimeAugmentation()
    assert many.augmentation.scales == (480, 576, 688, 864, 1200, 1400)
    assert not many.augmentation.box_averaging
    assert (averaged.augmentation.scales, averaged.augmentation.box_averaging) == (
        many.augmentation.scales,
        True,
    )
    assert [row.paper["AP"] for row in (once, many, averaged)] == [36.1, 37.1, 37.5]
    assert once.recipe.anchor_sizes == (64, 128, 256, 512)
    assert once.starts_from == "table7/aligned-inception-resnet"


def test_patterns_and_unknown_names():
    assert {row.data for row in find_rows(["table5/*"])} == {COCO}
    assert find_rows(["table1/rfcn-1", "table1/rfcn-*"])[0].name == "table1/rfcn-1"
    assert len(find_rows(["table1/rfcn-1", "table1/rfcn-*"])) == 5
    with pytest.raises(ValueError, match=re.escape("but got 'table2/x', which matches none")):
        find_rows(["table1/rfcn-1", "table2/x"])


def test_list_has_every_row_once_with_the_published_numbers():
    text = list_rows(ROWS, None)
    for row in ROWS:
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [row.name])
        assert " / ".join(f"{number:.1f}" for number in row.paper.values()) in line
        assert "not measured" in line or "not implemented" in line


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_descriptions_list_the_choices(row):
    text = describe_row(row)
    if row.recipe is None:
        assert row.missing in text
        return
    assert row.choices
    assert all(line in text for line in row.choices)
    assert f"iterations: {row.recipe.iterations}" in text
