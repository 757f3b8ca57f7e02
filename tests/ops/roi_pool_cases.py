"""Random calls of the two RoI poolings, shared by their tests."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from operator_testing import Normal, as_channels_last, differentiate
from torch import Tensor

from deformnet.ops import deform_ps_roi_pool, deform_roi_pool

SAMPLINGS = ("bins", "msra", "aligned")
EVERY_SAMPLING = pytest.mark.parametrize("sampling", SAMPLINGS)
ROI_OR_PS = pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    input: Tensor
    boxes: Tensor
    offset: Tensor | None
    output_size: tuple[int, int]
    spatial_scale: float
    gamma: float
    sampling: str
    samples_per_bin: int
    position_sensitive: bool

    @property
    def operator(self) -> tuple:
        """In the order of the registered operator."""
        rule = self.output_size, self.spatial_scale, self.gamma, self.sampling, self.samples_per_bin
        return (self.input, self.boxes, self.offset, *rule, self.position_sensitive)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient."""
        leaves = {"input": self.input}
        return leaves if self.offset is None else {**leaves, "offset": self.offset}

    def to(self, dtype: torch.dtype, positions: torch.dtype | None = None) -> "Case":
        """In another dtype; boxes and offset in `positions`, if that is given."""
        return replace(
            self,
            input=self.input.to(dtype),
            boxes=self.boxes.to(positions or dtype),
            offset=None if self.offset is None else self.offset.to(positions or dtype),
        )

    def output_size_of(self) -> tuple[int, int, int, int]:
        channels = self.input.shape[1]
        if self.position_sensitive:
            channels //= self.output_size[0] * self.output_size[1]
        return self.boxes.shape[0], channels, *self.output_size


def random_boxes(
    draw: random.Random, count: int, batch: int, height: float, width: float
) -> Tensor:
    """[R, 5] around an image of this size: inside, over its edges, tiny, inside out, on halves."""
    rows = []
    for _ in range(count):
        x1, x2 = sorted(draw.uniform(-0.2 * width, 1.2 * width) for _ in range(2))
        y1, y2 = sorted(draw.uniform(-0.2 * height, 1.2 * height) for _ in range(2))
        kind = draw.choice(["any", "any", "any", "whole", "half", "tiny", "inside out", "far"])
        if kind == "whole":
            x1, y1, x2, y2 = map(round, (x1, y1, x2, y2))
        elif kind == "half":
            x1, y1, x2, y2 = (round(number) + 0.5 for number in (x1, y1, x2, y2))
        elif kind == "tiny":
            x2, y2 = x1 + draw.random(), y1 + draw.choice([0.0, 0.3])
        elif kind == "inside out":
            x1, x2 = x2, x1
            if draw.random() < 0.5:
                y1, y2 = y2, y1
        elif kind == "far":
            x1, x2 = x1 - 3 * width, x2 + 2 * width
        rows.append([draw.randrange(batch), x1, y1, x2, y2])
    return torch.tensor(rows, dtype=torch.float64).reshape(count, 5)


def random_case(
    seed: int,
    sampling: str | None = None,
    position_sensitive: bool | None = None,
    *,
    shifted: bool | None = None,
) -> Case:
    """A small random call in float64.

    Args:
        sampling, position_sensitive: any, by default.
        shifted: with an offset or without one; by default either.
    """
    draw = random.Random(seed)
    normal = Normal(seed)
    sampling = sampling or draw.choice(SAMPLINGS)
    if position_sensitive is None:
        position_sensitive = draw.random() < 0.5
    groups = draw.choice([1, 1, 2, 3])
    channels = groups * draw.choice([1, 1, 2])
    batch = draw.choice([1, 2, 3])
    ph, pw = draw.choice([(1, 1), (2, 2), (3, 3), (2, 3), (4, 1), (3, 2)])
    height, width = draw.choice([(1, 1), (5, 6), (7, 4), (6, 9), (1, 8), (3, 1)])
    scale = draw.choice([1.0, 0.5, 0.25, 0.0625, 0.3])
    samples = draw.choice([1, 2, 3, 4])
    if sampling == "aligned" and draw.random() < 0.4:
        samples = 0
    count = draw.choice([1, 2, 3, 5])
    part = ph, pw
    if sampling == "msra" and draw.random() < 0.4:
        part = draw.choice([(1, 1), (2, 3), (5, 4)])
    input = normal(batch, channels * (ph * pw if position_sensitive else 1), height, width)
    input = as_channels_last(input, draw.random() < 0.5)
    has_offset = draw.random() < 0.7 if shifted is None else shifted
    offset = normal(count, 2 * groups, *part) * draw.choice([0.5, 2, 10])
    return Case(
        input=input,
        boxes=random_boxes(draw, count, batch, height / scale, width / scale),
        offset=offset if has_offset else None,
        output_size=(ph, pw),
        spatial_scale=scale,
        gamma=draw.choice([0.1, 0.1, 0.35]),
        sampling=sampling,
        samples_per_bin=samples,
        position_sensitive=position_sensitive,
    )


def large_case(
    sampling: str,
    position_sensitive: bool,
    *,
    groups: int = 1,
    channels_last: bool = False,
    samples_per_bin: int = 4,
) -> Case:
    """A call that fills vectors and tiles and leaves remainders of all of them."""
    normal = Normal()
    count, channels, (ph, pw) = 23, 42, (3, 5)
    input = normal(2, channels * (ph * pw if position_sensitive else 1), 14, 19)
    return Case(
        input=as_channels_last(input, channels_last),
        boxes=random_boxes(random.Random(0), count, 2, 14 * 16, 19 * 16),
        offset=normal(count, 2 * groups, ph, pw),
        output_size=(ph, pw),
        spatial_scale=1 / 16,
        gamma=0.1,
        sampling=sampling,
        samples_per_bin=samples_per_bin,
        position_sensitive=position_sensitive,
    )


def call(case: Case, backend: str) -> Tensor:
    """The public function of the case."""
    function = deform_ps_roi_pool if case.position_sensitive else deform_roi_pool
    return function(
        *(case.input, case.boxes, case.offset, case.output_size),
        *(case.spatial_scale, case.gamma),
        sampling=case.sampling,
        samples_per_bin=case.samples_per_bin,
        backend=backend,
    )


def output_gradient(case: Case) -> Tensor:
    return Normal(1)(*case.output_size_of()).to(case.input.dtype)


def run(case: Case, backend: str, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    grad_output = output_gradient(case) if grad_output is None else grad_output
    return differentiate(
        lambda **leaves: call(replace(case, **leaves), backend), case.leaves, grad_output
    )
