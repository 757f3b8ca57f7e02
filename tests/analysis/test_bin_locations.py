import pytest
import torch
from torch import nn

from deformnet import DeformPSRoIPool2d, DeformRoIPool2d
from deformnet.analysis import bin_locations

BOXES = torch.tensor([[0.0, 10, 20, 70, 50], [1, 5, 5, 6, 8]])


class Head(nn.Module):
    """Position-sensitive pooling of two classes, each with offsets of its own."""

    def __init__(self):
        super().__init__()
        self.pool = DeformPSRoIPool2d(
            3, (2, 3), 0.25, offset_groups=2, gamma=0.5, sampling="aligned"
        )

    def forward(self, features, boxes):
        maps = features.new_zeros(len(features), 12, *features.shape[2:])
        return self.pool(maps, features, boxes)


def expected(box, i, j, shift, ph=2, pw=3):
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    left, top = x1 + w * j / pw + shift[0] * w, y1 + h * i / ph + shift[1] * h
    return [left, top, left + w / pw, top + h / ph]


def test_bins_move_by_gamma_times_the_offset_times_the_size():
    head = Head()
    # Constant fields: each bin's offset is the bias of its channel.
    bias = torch.randn(2 * 2 * 6)
    with torch.no_grad():
        head.pool.conv_offset.bias.copy_(bias)
    features = torch.randn(2, 3, 30, 40)
    plain, moved = bin_locations(head, "pool", features, BOXES)
    assert plain.shape == (2, 2, 3, 4)
    assert moved.shape == (2, 2, 2, 3, 4)
    for r, (_, *box) in enumerate(BOXES.tolist()):
        for i in range(2):
            for j in range(3):
                assert plain[r, i, j].tolist() == pytest.approx(expected(box, i, j, (0, 0)))
                for g in range(2):
                    # Channel (c*ph + i)*pw + j of the fields, c = 2*g for x and 2*g + 1 for y.
                    shift = [0.5 * float(bias[((2 * g + k) * 2 + i) * 3 + j]) for k in (0, 1)]
                    found = moved[r, g, i, j].tolist()
                    assert found == pytest.approx(expected(box, i, j, shift), abs=1e-4)


def test_the_layer_of_faster_rcnn_and_lists_of_boxes():
    pool = DeformRoIPool2d(2, 2, 0.5, sampling="aligned")
    with torch.no_grad():
        pool.fc_offset.bias[0] = 1.0  # x of bin (0, 0)
    boxes = [BOXES[:1, 1:], BOXES[1:, 1:]]
    plain, moved = bin_locations(pool, "", torch.zeros(2, 2, 40, 40), boxes)
    shift = moved[:, 0] - plain
    assert shift[0, 0, 0].tolist() == pytest.approx([6, 0, 6, 0])  # a tenth of 60 pixels
    assert shift[1, 0, 0].tolist() == pytest.approx([0.1, 0, 0.1, 0], abs=1e-6)
    assert shift[:, 1].abs().max() == 0
    named = nn.ModuleDict({"pool": pool})
    again = bin_locations(named, "pool", torch.zeros(2, 2, 40, 40), boxes, call=pool)
    assert torch.equal(again.deformed, moved)


@pytest.mark.parametrize("sampling", ["bins", "msra", "aligned"])
def test_bins_move_as_far_as_the_samples(sampling):
    """On a ramp the pooled value is the mean position: its change is how far a bin has moved."""
    boxes = torch.tensor(
        [[0.0, 101, 90, 140, 117], [0, 88, 120, 99.4, 139.7], [0, 150, 100, 151, 101]]
    )
    scale = 1 / 16
    ramp = torch.arange(20.0).expand(1, 1, 20, 20)
    for axis, maps in enumerate((ramp, ramp.mT)):
        pool = DeformRoIPool2d(1, 2, scale, sampling=sampling)
        plain_mean = pool(maps, boxes)
        with torch.no_grad():
            pool.fc_offset.bias[4 * axis : 4 * axis + 4] = torch.tensor([-1.0, 0.5, 1, 0])
        shift = (pool(maps, boxes) - plain_mean)[:, 0] / scale

        plain, moved = bin_locations(pool, "", maps, boxes)
        torch.testing.assert_close((moved[:, 0] - plain)[..., axis], shift, rtol=0, atol=2e-3)
        assert ((moved[:, 0] - plain)[..., 1 - axis] == 0).all()
        # Together the bins are the box, of which "bins" and "msra" name the last pixel.
        edges = boxes[:, 1:].clone()
        edges[:, 2:] += sampling != "aligned"
        torch.testing.assert_close(plain[:, 0, 0, :2], edges[:, :2])
        torch.testing.assert_close(plain[:, 1, 1, 2:], edges[:, 2:])


def test_missing_layer():
    with pytest.raises(ValueError, match=r"expected layer to be one of pool, but got 'poll'"):
        bin_locations(Head(), "poll", torch.zeros(1, 3, 8, 8), BOXES[:1])
    with pytest.raises(ValueError, match=r"\(the model has none\)"):
        bin_locations(nn.Conv2d(1, 1, 1), "pool", torch.zeros(1, 1, 8, 8))


def test_each_detection_has_the_bins_of_its_class():
    head = Head()
    with torch.no_grad():
        head.pool.conv_offset.bias.normal_()
    found = bin_locations(head, "pool", torch.randn(2, 3, 30, 40), BOXES)
    own = found.of_groups(torch.tensor([1, 0]))
    assert torch.equal(own, torch.stack([found.deformed[0, 1], found.deformed[1, 0]]))
    shared = found._replace(deformed=found.deformed[:, :1])
    assert torch.equal(shared.of_groups(torch.tensor([5, 7])), found.deformed[:, 0])
    with pytest.raises(ValueError, match=r"expected groups to be 0 to 1, but got \[0, 2\]"):
        found.of_groups(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"expected groups to be \[2\], but got \[1\]"):
        found.of_groups(torch.tensor([0]))


def test_arguments_by_name_and_the_models_mode():
    class ByName(Head):
        def forward(self, features, boxes):
            assert not self.training
            maps = features.new_zeros(len(features), 12, *features.shape[2:])
            return self.pool(boxes=boxes, maps=maps, features=features)

    head = ByName()
    features = torch.randn(2, 3, 30, 40)
    found = bin_locations(head, "pool", features, BOXES)
    assert torch.equal(found.regular, bin_locations(Head(), "pool", features, BOXES).regular)
    assert head.training


def test_boxes_are_left_as_they_are():
    boxes = BOXES.double()
    bin_locations(DeformRoIPool2d(2, 2).double(), "", torch.zeros(2, 2, 40, 40).double(), boxes)
    assert torch.equal(boxes, BOXES.double())


def test_boxes_and_features_that_change_after_the_call():
    class Changing(Head):
        def forward(self, features, boxes):
            pooled = super().forward(features, boxes)
            features.zero_()
            boxes.zero_()
            return pooled

    torch.manual_seed(0)
    head, changing = Head(), Changing()
    nn.init.normal_(head.pool.conv_offset.weight)
    changing.load_state_dict(head.state_dict())
    features = torch.randn(2, 3, 30, 40)
    expected = bin_locations(head, "pool", features, BOXES)
    found = bin_locations(changing, "pool", features.clone(), BOXES.clone())
    assert torch.equal(found.deformed, expected.deformed)
    assert torch.equal(found.regular, expected.regular)
