"""Argument checks shared by several operators.

Sizes may be symbolic: the checks run in the public functions, in the fakes that a compiler traces,
and in the kernels (so that calls through `torch.ops` do not read outside their tensors either).
"""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

Pair: TypeAlias = tuple[int, int]
IntOrPair: TypeAlias = SupportsIndex | Sequence[SupportsIndex]

# Upper bound of sizes that kernels store as 32-bit integers. Rounded up to whole vectors or tiles,
# or increased by one, they still fit.
MOST = 2 * 10**9
# Rows and columns of a map; with padding at both ends, they are at most `MOST`.
MOST_SIDE = MOST // 2
MOST_PADDING = MOST // 4

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def integer(name: str, value: Any) -> int:
    """Convert an argument to int. NumPy integers are accepted, floats are a TypeError."""
    return _index(value, name, "an int", value)


def positive(name: str, value: Any) -> int:
    """Convert an argument to an int as `integer`; less than 1 is a ValueError."""
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"expected {name} to be at least 1, but got {value}")
    return value


def check_pair(name: str, value: Sequence[int]) -> None:
    """Raise ValueError unless there are two values; the dispatcher accepts any number of them."""
    if len(value) != 2:
        raise ValueError(f"expected {name} to be a pair of ints, but got {len(value)} values")


def check_most(name: str, what: str, size: int, most: int, *sides: int) -> None:
    """Raise ValueError if an argument has too many of something.

    Args:
        sides: numbers that the message shows instead of the size, joined by "x".
    """
    if size > most:
        got = " x ".join(map(str, sides or (size,)))
        raise ValueError(f"expected {name} to have at most {most} {what}, but got {got}")


def check_sides(input: Tensor) -> None:
    """Raise ValueError if a map [N, C, H, W] has more rows or columns than a kernel supports.

    Only for kernels: a compiler that traces this check would specialize on the sizes.
    """
    _, _, height, width = input.shape
    check_most("input", "rows and columns", max(height, width), MOST_SIDE, height, width)


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless an argument has one of a few values."""
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {tuple(choices)}, but got {value!r}")


def pair(name: str, value: Any) -> Pair:
    """Convert an int or a sequence of ints to (vertical, horizontal).

    Raises:
        TypeError: if it is neither an int nor a tuple or list of ints.
        ValueError: if it is a sequence of more than two ints.
    """
    if type(value) is int:
        return value, value
    expected = "an int or a pair of ints"
    if not isinstance(value, (tuple, list)):
        both = _index(value, name, expected, value)
        return both, both
    if not 1 <= len(value) <= 2:
        raise ValueError(f"expected {name} to be {expected}, but got {len(value)} values")
    return _index(value[0], name, expected, value), _index(value[-1], name, expected, value)


def _index(value: Any, name: str, expected: str, argument: Any) -> int:
    # Symbolic ints stay symbolic.
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # pyright: ignore[reportReturnType]
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"expected {name} to be {expected}, but got {argument!r}") from None


def number(name: str, value: Any) -> float:
    """Convert an argument to a number. NumPy floats are accepted, strings are a TypeError."""
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return value  # pyright: ignore[reportReturnType]
    if not hasattr(type(value), "__float__"):
        raise TypeError(f"expected {name} to be a number, but got {value!r}")
    return float(value)


def check_input(input: Any) -> tuple[int, int, int, int]:
    """Check an input [N, C, H, W].

    Returns:
        Its shape.

    Raises:
        TypeError: if it is not a tensor or has the wrong dtype.
        ValueError: if it is not 4-dimensional, or has no channels, rows or columns.
    """
    check_tensor("input", input, 4)
    if input.dtype not in DTYPES:
        raise TypeError(f"expected input to be one of {dtype_names(DTYPES)}, but got {input.dtype}")
    batch, channels, height, width = input.shape
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(
            "expected input to have at least one channel, row and column, "
            f"but got shape {shape_text(input)}"
        )
    return batch, channels, height, width


def check_tensor(
    name: str, tensor: Any, rank: int, like: Tensor | None = None, or_float32: bool = False
) -> None:
    """Check type and rank, and also dtype and device against `like`, the input.

    Args:
        or_float32: also accept float32 with a half-precision input.

    Raises:
        TypeError: if it is not a tensor or has the wrong dtype.
        ValueError: if the rank or the device is wrong.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a tensor, but got {type(tensor).__name__}")
    if tensor.dim() != rank:
        raise ValueError(
            f"expected {name} to be {rank}-dimensional, but got shape {shape_text(tensor)}"
        )
    if like is None:
        return
    dtype, expected = tensor.dtype, like.dtype
    if dtype != expected and not (
        or_float32 and dtype == torch.float32 and expected in (torch.bfloat16, torch.float16)
    ):
        raise TypeError(
            f"expected {name} to be {expected} like input"
            f"{' or torch.float32' if or_float32 else ''}, but got {dtype}"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"expected {name} to be on {like.device} like input, but got {tensor.device}"
        )


def values_known(tensor: Tensor) -> bool:
    """Whether Python can read the values of a tensor: it is not fake, traced or batched by vmap."""
    return with_values(tensor) is not None


def with_values(tensor: Tensor) -> Tensor | None:
    """The tensor without torch.func wrappers, or None if Python cannot read its values."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return None
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return None
        tensor = get_unwrapped(tensor)
    return tensor


def shape_text(tensor: Tensor) -> str:
    """Formats a shape for a message."""
    # A compiler that traces this can format symbolic sizes, but not a list of them.
    return f"[{', '.join([f'{size}' for size in tensor.shape])}]"


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Formats dtypes for a message."""
    return ", ".join(str(dtype) for dtype in dtypes)
