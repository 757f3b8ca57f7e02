"""Gradients of a map, to which many programs add at the same places.

Numbers added in float32 in any order give a sum that differs in its last bits from run to run.
Where PyTorch is told to be deterministic, they are added as whole multiples of a unit instead, in
64-bit integers, whose sum does not depend on the order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bits for the sum of all numbers, one of the 64 being the sign, another a reserve for rounding.
_BITS = 62


class Sums:
    """A tensor of zeros to add to, by `add` within a kernel.

    Args:
        shape: of the tensor.
        dtype: float32, or float64.
        device: where it is.
        largest: a number [] in float64 that no finite number to be added exceeds. Only read where
            sums are deterministic; see `deterministic`.
        count: how many numbers are added to any one place, at most.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        largest: Tensor | None,
        count: int,
    ) -> None:
        self.fixed = largest is not None
        self.floats = torch.zeros(shape, dtype=dtype, device=device)
        if largest is None:
            # Not read: the kernels want tensors all the same.
            self.integers, self.scale = self.floats, self.floats
            return
        self.integers = torch.zeros(shape, dtype=torch.int64, device=device)
        # The power of two that lets the largest possible sum fit.
        exponent = _BITS - torch.log2(largest * max(count, 1)).ceil()
        # No finite number at all, or none but zeros, gives infinities here.
        exponent = torch.where(largest > 0, exponent, 0).clamp(-1000, 1000)
        self.scale = torch.exp2(exponent)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `add` takes first."""
        return self.floats, self.integers, self.scale

    def result(self) -> Tensor:
        """The sums so far."""
        if not self.fixed:
            return self.floats
        # What was not finite was added to the floats.
        return self.floats + (self.integers.double() / self.scale).to(self.floats.dtype)


def deterministic() -> bool:
    """Whether PyTorch is told to give the same bits in every run."""
    return torch.are_deterministic_algorithms_enabled()


def largest_finite(tensor: Tensor) -> Tensor:
    """The largest finite magnitude in a tensor, [] in float64; 0 if there is none."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    magnitude = tensor.abs()
    return torch.where(magnitude.isfinite(), magnitude, 0).amax().double()


@triton.jit
def add(floats, integers, scale, place, number, where, FIXED: tl.constexpr):
    """Adds `number` to the sums at `place`, where `where` is true.

    Args:
        floats, integers: the tensors of a `Sums`.
        scale: its number, in float64.
        FIXED: its `fixed`.
    """
    if FIXED:
        finite = (number - number) == 0
        whole = tl.where(finite, number, 0).to(tl.float64) * scale
        # Halves upwards; conversion alone would cut off, towards zero.
        whole = tl.floor(whole + 0.5).to(tl.int64)
        tl.atomic_add(integers + place, whole, mask=where & finite, sem="relaxed")
        tl.atomic_add(floats + place, number, mask=where & (finite == 0), sem="relaxed")
    else:
        tl.atomic_add(floats + place, number, mask=where, sem="relaxed")
