"""Cross entropy of upsampled scores against PyTorch's operators."""

import pytest
import torch
import torch.nn.functional as F

from deformnet.models import _upsampled_loss as module
from deformnet.models._upsampled_loss import upsampled_cross_entropy

IGNORED = 255


def expected(scores, target, factor):
    logits = F.interpolate(scores, scale_factor=factor, mode="bilinear")
    logits = logits[..., : target.shape[1], : target.shape[2]]
    return F.cross_entropy(logits, target.long(), ignore_index=IGNORED, reduction="sum")


def case(factor, size, dtype=torch.float64, classes=5):
    rows, columns = (-(-side // factor) for side in size)
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, classes, rows, columns, dtype=dtype, generator=generator)
    target = torch.randint(classes, (2, *size), dtype=torch.uint8, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORED
    return scores.requires_grad_(), target


@pytest.mark.parametrize("strip", [1, 2**18], ids=["rows", "images"])
@pytest.mark.parametrize(
    ("factor", "size"), [(16, (64, 48)), (16, (50, 37)), (4, (9, 21)), (2, (1, 1)), (1, (6, 7))]
)
def test_value_and_gradient_are_those_of_pytorch(factor, size, strip, monkeypatch):
    monkeypatch.setattr(module, "_STRIP", strip)
    scores, target = case(factor, size)
    loss, reference = (
        of(scores, target, factor, *ignored)
        for of, ignored in ((upsampled_cross_entropy, [IGNORED]), (expected, []))
    )
    torch.testing.assert_close(loss, reference)
    (gradient,), (of_reference,) = (
        torch.autograd.grad(0.5 * it, scores) for it in (loss, reference)
    )
    torch.testing.assert_close(gradient, of_reference)
    assert upsampled_cross_entropy(scores, target.long(), factor, IGNORED) == loss


def test_large_scores_and_void_images():
    scores, target = case(8, (16, 24), torch.float32)
    target[0] = IGNORED
    large = (1e4 * scores.detach()).requires_grad_()
    loss = upsampled_cross_entropy(large, target, 8, IGNORED)
    torch.testing.assert_close(loss, expected(large, target, 8))
    (gradient,) = torch.autograd.grad(loss, large)
    assert gradient.isfinite().all()
    assert not gradient[0].any()
    void = upsampled_cross_entropy(large[:1], target[:1], 8, IGNORED)
    assert void.item() == 0
    assert not torch.autograd.grad(void, large)[0].any()


def test_single_precision_under_autocast():
    scores, target = case(16, (48, 48), torch.float32)
    alone = upsampled_cross_entropy(scores, target, 16, IGNORED)
    with torch.autocast("cpu", torch.bfloat16):
        under = upsampled_cross_entropy(scores, target, 16, IGNORED)
    assert under.dtype == torch.float32
    assert under == alone


def test_scores_that_are_not_finite_give_no_finite_loss():
    for value in (float("nan"), float("inf")):
        scores, target = case(4, (8, 8))
        with torch.no_grad():
            scores[1, 2, 0, 1] = value
        assert not upsampled_cross_entropy(scores, target, 4, IGNORED).isfinite()


def test_a_batch_without_images_has_no_loss():
    scores = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = upsampled_cross_entropy(scores, torch.zeros(0, 8, 8).long(), 4, IGNORED)
    loss.backward()
    assert loss == 0
