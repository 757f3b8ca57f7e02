"""Names of splits."""

import pytest

from deformnet.data.splits import resolve


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        ("train val valid", "val", "val"),
        ("train valid test", "val", "valid"),
        ("train validation dev", "val", "validation"),
        ("train dev test", "val", "dev"),
        ("train test", "val", "test"),
        ("training test", "train", "training"),
        ("Train VAL", "val", "VAL"),
        ("Train Valid", "train", "Train"),
        ("val", "train", "train"),
        ("train", "val", "val"),
        ("train val", "test", "test"),
        ("train valid", "valid", "valid"),
    ],
)
def test_usual_names(names, wanted, found):
    assert resolve(names.split(), wanted) == found
