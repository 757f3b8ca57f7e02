"""What only the Triton kernels of RoI pooling have: tiles, fixed-point sums, wide addresses."""

import importlib
import os
from dataclasses import replace

import pytest
import torch
from operator_testing import assert_same
from roi_pool_cases import SAMPLINGS, Case, call, output_gradient, random_case, run

from deformnet.ops.roi_pool.checks import Rule

pytest.importorskip("triton", reason="the package triton is not installed")
kernels = importlib.import_module("deformnet.ops.roi_pool.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="there is no GPU, and TRITON_INTERPRET=1 is not set",
)
ROI_OR_PS = pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])
EVERY_SAMPLING = pytest.mark.parametrize("sampling", SAMPLINGS)


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter takes as long for a large tile as for a small one."""
    monkeypatch.setattr(kernels, "_tile", lambda channels: kernels._Tile(128, 2, 4))


def run_here(case: Case, grad_output: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The output and all gradients, by name."""

    def there(value):
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    tensors, rule = case.operator[:3], Rule(*case.operator[3:])
    arguments = *(there(tensor) for tensor in tensors), rule
    grad_output = there(output_gradient(case) if grad_output is None else grad_output)
    needs = True, case.offset is not None
    gradients = kernels.roi_pool_backward(grad_output, *arguments, needs)
    found = {"output": kernels.roi_pool(*arguments), "grad_input": gradients[0]}
    if gradients[1] is not None:
        found["grad_offset"] = gradients[1]
    return {name: tensor.cpu() for name, tensor in found.items()}


def crowd(position_sensitive: bool, sampling: str = "aligned") -> Case:
    """Eight boxes on the same few pixels, in groups of two channels."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    image = torch.arange(8, dtype=torch.float64)[:, None] % 2
    corners = 2 + 2 * torch.rand(8, 2, generator=generator, dtype=torch.float64)
    return Case(
        input=normal(2, 6 * (4 if position_sensitive else 1), 7, 8),
        boxes=torch.cat([image, corners, corners + 3], dim=1),
        offset=normal(8, 6, 2, 2),
        output_size=(2, 2),
        spatial_scale=1.0,
        gamma=0.1,
        sampling=sampling,
        samples_per_bin=2,
        position_sensitive=position_sensitive,
    )


@runs
@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("seed", range(3000, 3002))
def test_agrees_with_the_reference(seed, sampling, position_sensitive):
    case = random_case(seed, sampling, position_sensitive)
    found = run_here(case)
    assert_same(found, run(case, "reference"), 1e-10)
    channels_last = not case.input.is_contiguous()
    assert found["grad_input"].is_contiguous() != channels_last
    assert found["output"].is_contiguous()


@runs
@ROI_OR_PS
@pytest.mark.parametrize("tile", [(8, 1, 1), (16, 8, 2)])
def test_the_bits_of_a_mean_do_not_depend_on_the_tile(
    monkeypatch, large_tiles, tile, position_sensitive
):
    case = crowd(position_sensitive).to(torch.float32)
    case = replace(case, boxes=case.boxes[:2], offset=case.offset[:2])
    expected = run_here(case)
    monkeypatch.setattr(kernels, "_tile", lambda channels: kernels._Tile(*tile))
    found = run_here(case)
    assert found["output"].equal(expected["output"])
    assert_same(found, expected, 1e-6)


@runs
@ROI_OR_PS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_gradients_have_the_same_bits_twice(large_tiles, dtype, position_sensitive):
    case = crowd(position_sensitive).to(dtype, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        one = run_here(case)
        # Bins in another order add the same numbers.
        back = torch.arange(7, -1, -1)
        other = run_here(
            replace(case, boxes=case.boxes[back], offset=case.offset[back]),
            output_gradient(case)[back],
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert one["grad_input"].equal(other["grad_input"])
    assert one["output"].equal(other["output"][back])
    assert one["grad_offset"].equal(other["grad_offset"][back])
    gradient = output_gradient(case).double()
    exact = run(case.to(torch.float64), "reference", gradient)
    assert_same(one, exact, 2e-5 if dtype == torch.float32 else 8e-3)


@runs
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_that_are_not_finite_stay_where_they_belong(large_tiles, deterministic):
    case = crowd(False)
    gradient = output_gradient(case)
    clean = run_here(case, gradient)
    gradient[0, 0, 0, 0] = float("inf")
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = run_here(case, gradient)
    finally:
        torch.use_deterministic_algorithms(False)
    bad = ~found["grad_input"].isfinite()
    assert 0 < bad.sum() < 40
    assert not bad[:, 1:].any()
    assert_same({"": found["grad_input"][~bad]}, {"": clean["grad_input"][~bad]}, 1e-10)


@runs
@ROI_OR_PS
@EVERY_SAMPLING
def test_wide_addresses_agree(monkeypatch, large_tiles, sampling, position_sensitive):
    case = crowd(position_sensitive, sampling)
    narrow = run_here(case)
    monkeypatch.setattr(kernels, "_LEAST_WIDE", 0)
    assert_same(run_here(case), narrow, 1e-12)


@runs
@ROI_OR_PS
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_summed_image_by_image_agree(
    monkeypatch, large_tiles, deterministic, position_sensitive
):
    case = crowd(position_sensitive)
    case.boxes[3, 0] = 7  # an image that does not exist
    expected = run_here(case)
    assert expected["grad_offset"][3].isnan().all()
    monkeypatch.setattr(kernels, "_MOST_SUMS", 1)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = run_here(case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, expected, 1e-12, equal_nan=True)


@runs
@pytest.mark.parametrize("image", [-1.0, 2.0, float("nan")])
def test_boxes_of_no_image_give_nan_and_read_nothing(large_tiles, image):
    case = crowd(False)
    outside = replace(case, boxes=case.boxes.clone())
    outside.boxes[5, 0] = image
    found, clean = run_here(outside), run_here(case)
    assert found["output"][5].isnan().all()
    assert found["grad_offset"][5].isnan().all()
    assert found["grad_input"].isfinite().all()
    others = torch.arange(8) != 5
    assert found["output"][others].equal(clean["output"][others])


@runs
def test_no_images_at_all():
    case = crowd(False)
    found = run_here(replace(case, input=case.input[:0], boxes=case.boxes[:2], offset=None))
    assert found["output"].isnan().all()
    assert found["grad_input"].shape == (0, 6, 7, 8)


@runs
@pytest.mark.parametrize("length", [3.0, 41.0, 1e7])
@pytest.mark.parametrize(
    ("sampling", "samples_per_bin"), [("bins", 4), ("aligned", 0), ("msra", 5)]
)
def test_samples_of_large_boxes(large_tiles, length, sampling, samples_per_bin):
    """Up to the whole map in one bin, and far more beyond it."""
    case = replace(crowd(False, sampling), samples_per_bin=samples_per_bin)
    boxes = torch.tensor([[0, 1.5, 0.2, 1.5 + length, 0.2 + length]], dtype=torch.float64)
    ramp = torch.arange(5, dtype=torch.float64) + 10 * torch.arange(4)[:, None]
    case = replace(case, input=ramp.expand(1, 6, -1, -1), boxes=boxes, offset=case.offset[:1])
    assert_same(run_here(case), run(case, "reference"), 1e-10)


@runs
def test_strides_of_any_kind(large_tiles):
    case = crowd(True)
    expected = run_here(case)
    strided = replace(
        case,
        input=case.input.transpose(2, 3).contiguous().transpose(2, 3),
        boxes=case.boxes.t().contiguous().t(),
        offset=case.offset.flip(0).flip(0).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    )
    assert_same(run_here(strided), expected, 1e-12)
    assert call(strided, "reference").is_contiguous()
