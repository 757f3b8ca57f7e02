"""Gradients of a map to which many programs add at the same positions.

Floating-point numbers added in any order give a sum that differs in its last bits from run to run.
Under `torch.use_deterministic_algorithms(True)` they are added as integer multiples of a unit
instead, in 64 bits; a sum of integers does not depend on the order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bits for the sum of all numbers: 64, less one for the sign and one in reserve for rounding.
_BITS = 62


class Target(NamedTuple):
    """The tensors of a `Sums` as a kernel takes them.

    Float sums have no integers: both other fields are the floats again, since Triton before 3.8
    takes no None within a tuple. Kernels are compiled for the dtype of `integers`.
    """

    floats: Tensor
    integers: Tensor  # int64
    scale: Tensor  # [] in float64, the unit's inverse


class Sums:
    """A tensor of zeros that kernels add to, through `add`.

    Args:
        shape: shape of the tensor.
        dtype: float32 or float64.
        device: device of the tensor.
        largest: upper bound of the finite magnitudes to be added, [] in float64, for deterministic
            sums; None for float sums.
        count: maximum number of additions to one place.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        largest: Tensor | None,
        count: int,
    ) -> None:
        floats = torch.zeros(shape, dtype=dtype, device=device)
        self.target = Target(floats, floats, floats)
        if largest is None:
            return
        # The power of two with which the largest possible sum still fits.
        exponent = _BITS - torch.log2(largest * max(count, 1)).ceil()
        # Infinite if there is no finite number at all, or none but zeros.
        exponent = torch.where(largest > 0, exponent, 0).clamp(-1000, 1000)
        integers = torch.zeros(shape, dtype=torch.int64, device=device)
        self.target = Target(floats, integers, torch.exp2(exponent))

    def result(self) -> Tensor:
        """The sums so far."""
        floats, integers, scale = self.target
        if integers is floats:
            return floats
        # The floats hold the numbers that were not finite.
        return floats + (integers.double() / scale).to(floats.dtype)


def deterministic() -> bool:
    """Whether PyTorch is set to use deterministic algorithms."""
    return torch.are_deterministic_algorithms_enabled()


def largest_finite(tensor: Tensor) -> Tensor:
    """The largest finite magnitude in a tensor, [] in float64; 0 if there is none."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    magnitude = tensor.abs()
    return torch.where(magnitude.isfinite(), magnitude, 0).amax().double()


@triton.jit
def scale_of(target):
    """The factor that makes integers of numbers, for `add`; read once, ahead of all loops."""
    return tl.load(target.scale) if target.integers.dtype.element_ty == tl.int64 else 1.0


@triton.jit
def add(target, scale, index, number, where):
    """Adds `number` to the sums at `index`, where `where` is true.

    Every addition is one atomic, relaxed because only the end of the kernel orders the sums for
    their reader. Float atomics give the same bits in every run only where no two numbers meet at
    one place; integer atomics always do. Numbers that are not finite go to the floats even then:
    a sum of infinities and NaN does not depend on the order, either.

    Args:
        target: the `Target` of a `Sums`.
        scale: `scale_of(target)`.
        index: indices into the tensor.
    """
    if target.integers.dtype.element_ty == tl.int64:
        # Not by number - number, which the compiler may fuse with the product that gave the number:
        # the difference is then what has been rounded off.
        finite = tl.abs(number) < float("inf")
        whole = tl.where(finite, number, 0).to(tl.float64) * scale
        # Round to the nearest integer; the conversion alone would truncate.
        whole = tl.floor(whole + 0.5).to(tl.int64)
        tl.atomic_add(target.integers + index, whole, mask=where & finite, sem="relaxed")
        tl.atomic_add(target.floats + index, number, mask=where & ~finite, sem="relaxed")
    else:
        tl.atomic_add(target.floats + index, number, mask=where, sem="relaxed")
