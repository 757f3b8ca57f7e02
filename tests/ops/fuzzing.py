"""Random calls of the operators on a CPU, valid and invalid, in any layout and dtype.

    python fuzzing.py SEED FIRST END

runs the calls FIRST to END - 1 of a seed, and prints a line before each call and for each finding.
`test_fuzz.py` starts this program, and continues after a call that ends the process. A valid call
must give the same result as a definition in float64, and not write outside its results. A call with
an extreme argument must raise a documented error or give the same result as the reference.
"""

import faulthandler
import random
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import deform_conv_cases
import numpy as np
import roi_pool_cases
import torch
from cuda_cases import leaves
from operator_testing import HALVES, Normal, as_channels_last, strided
from roi_pool_loops import naive
from torch import Tensor

import conftest  # noqa: F401  # takes the library that DEFORMNET_TEST_LIBRARY names
from deformnet.ops import cpu, deform_conv2d, deform_ps_roi_pool, deform_roi_pool
from deformnet.ops._arguments import MOST_PADDING
from deformnet.ops.deform_conv.operator import OPERATOR as DEFORM_CONV
from deformnet.ops.roi_pool.operator import OPERATOR as ROI_POOL

Case = deform_conv_cases.Case | roi_pool_cases.Case
Results = dict[str, Tensor]

DTYPES = [torch.float64, torch.float32, *HALVES]
# Maximum error, relative to the largest number of a tensor.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5}
TOLERANCE |= {dtype: 2 * torch.finfo(dtype).eps for dtype in HALVES}
# What a call may raise; NotImplementedError is a RuntimeError.
ERRORS = (TypeError, ValueError, RuntimeError, MemoryError)
NAN, INF = float("nan"), float("inf")
# Additional memory that a call may use, and its time limit in seconds.
MOST_MEMORY, MOST_SECONDS = 3 * 2**30, 60
BORDERS = ["zeros", "zeros", "msra2017"]


class Finding(Exception):
    """A call with a wrong result."""


class Draw(random.Random):
    """Random choices from a seed."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.normal = Normal(self.getrandbits(62))

    def one_in(self, number: int) -> bool:
        return self.randrange(number) == 0

    def where(self, shape: torch.Size, one_in: int) -> Tensor:
        """True at random places."""
        return torch.rand(shape, generator=self.normal.generator) < 1 / one_in


# ------------------------------------------------------------------------------------ definitions


def hat(position: Tensor, size: int, border: str) -> Tensor:
    """Weights [..., size] of all pixels of an axis at positions [...], with their derivatives.

    Equation 4; the derivative is the one from the right.
    """
    at = position.detach()[..., None]
    distance = at - torch.arange(size)
    weight = (1 - distance.abs()).clamp_min(0)
    rises, falls = (distance >= -1) & (distance < 0), (distance >= 0) & (distance < 1)
    slope = rises.double() - falls.double()
    if border == "msra2017":
        last = (torch.arange(size) == size - 1).double()
        inside, beyond = (at >= 0) & (at < size), at >= size - 1
        weight = torch.where(inside, torch.where(beyond, last, weight), 0)
        slope = torch.where(inside & ~beyond, slope, 0)
    return weight + slope * (position - position.detach())[..., None]


def convolve(case: deform_conv_cases.Case, border: str) -> Tensor:
    """Equation 2, where every tap is a product with the weights of all pixels."""
    n, channels, height, width = case.input.shape
    out_channels, group_channels, kh, kw = case.weight.shape
    groups, taps = channels // group_channels, kh * kw
    offset_groups = case.offset.shape[1] // (2 * taps)
    out = case.output_size()[2:]
    maps = case.input.reshape(n, offset_groups, channels // offset_groups, height, width)
    shifts = case.offset.reshape(n, offset_groups, taps, 2, *out)
    filters = case.weight.reshape(groups, out_channels // groups, group_channels, taps)
    base = [torch.arange(out[k]) * case.stride[k] - case.padding[k] for k in (0, 1)]
    total = case.input.new_zeros(n, groups, out_channels // groups, *out)
    for tap in range(taps):
        i, j = divmod(tap, kw)
        y = (base[0] + i * case.dilation[0])[:, None] + shifts[:, :, tap, 0]
        x = (base[1] + j * case.dilation[1]) + shifts[:, :, tap, 1]
        undefined = y.isnan() | x.isnan()
        rows, columns = (
            hat(torch.where(undefined | at.isinf(), -5, at), size, border)
            for at, size in ((y, height), (x, width))
        )
        value = torch.einsum("ngcab,ngija,ngijb->ngcij", maps, rows, columns)
        poison = torch.where(undefined, y + x, 0)
        value = torch.where(undefined[:, :, None], (poison * poison)[:, :, None], value)
        if case.mask is not None:
            value = value * case.mask.reshape(n, offset_groups, taps, 1, *out)[:, :, tap]
        value = value.reshape(n, groups, group_channels, *out)
        total = total + torch.einsum("goc,ngcij->ngoij", filters[..., tap], value)
    total = total.reshape(n, out_channels, *out)
    return total if case.bias is None else total + case.bias[:, None, None]


def differentiate(case: Case, run: Callable[[Case], Tensor], gradient: Tensor) -> Results:
    """The output and all gradients, by name."""
    given = {name: tensor.detach().requires_grad_() for name, tensor in leaves(case).items()}
    output = run(replace(case, **given))
    gradients = torch.autograd.grad(output, list(given.values()), gradient)
    names = (f"grad_{name}" for name in given)
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def definition(case: Case, border: str, dyadic: bool, gradient: Tensor) -> Results:
    """The output and all gradients in float64.

    Args:
        dyadic: whether no position is rounded, whatever the order of its sums and products.
    """
    case, gradient = case.to(torch.float64), gradient.double()
    if isinstance(case, deform_conv_cases.Case):
        return differentiate(case, lambda given: convolve(given, border), gradient)
    if dyadic:
        return naive(case, gradient)
    return differentiate(case, lambda given: public(given, border, "reference"), gradient)


def public(case: Case, border: str, backend: str) -> Tensor:
    """The public function."""
    if isinstance(case, deform_conv_cases.Case):
        return deform_conv2d(*case.public, border=border, backend=backend)
    return roi_pool_cases.call(case, backend)


def output_size(case: Case) -> tuple[int, ...]:
    convolves = isinstance(case, deform_conv_cases.Case)
    return case.output_size() if convolves else case.output_size_of()


# ------------------------------------------------------------------------------------ valid calls


def sixteenths(draw: Draw, *shape: int, scale: float) -> Tensor:
    """Numbers that float32 adds to small integers without rounding."""
    return (draw.normal(*shape) * scale * 16).round() / 16


def with_specials(draw: Draw, offset: Tensor, specials: list[float]) -> Tensor:
    """Some of the numbers replaced."""
    for special in specials:
        offset = offset.masked_fill(draw.where(offset.shape, 12), special)
    return offset


def expanded(draw: Draw, tensor: Tensor) -> Tensor:
    """The same numbers along some axes, which share memory."""
    axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 0 and draw.one_in(2)]
    shape = tensor.shape
    for axis in axes:
        tensor = tensor.narrow(axis, 0, 1)
    return tensor.expand(shape)


def convolution(draw: Draw) -> deform_conv_cases.Case:
    groups, offset_groups = draw.choice([1, 1, 1, 2, 3, 4]), draw.choice([1, 1, 2, 3])
    channels = groups * offset_groups * draw.choice([1, 1, 1, 2, 3, 8, 17])
    out_channels = groups * draw.choice([1, 1, 2, 3, 5, 16, 33])
    kernel = draw.choice([(1, 1), (3, 3), (3, 3), (2, 2), (1, 4), (5, 1), (2, 3)])
    stride, dilation, padding, size, out = [], [], [], [], []
    for k in kernel:
        side, d = draw.choice([1, 1, 2, 3, 4, 5, 7, 9, 17]), draw.choice([1, 1, 2, 3])
        if draw.one_in(12):
            # Far outside the map, except for a few positions.
            p = draw.choice([2**24 + 1, 2**28 - 3, MOST_PADDING // 2])
            d = draw.choice([d, MOST_PADDING // 8])
        else:
            p = draw.choice([0, 1, 1, 2, 3])
        reach = d * (k - 1) + 1
        p = max(p, -(-(reach - side) // 2))
        total = side + 2 * p - reach
        s = draw.choice([1, 1, 2, 3])
        if total // s > 20:
            s = min(MOST_PADDING, total // draw.choice([1, 2, 3]) + draw.choice([0, 1]))
        stride.append(s), dilation.append(d), padding.append(p), size.append(side)
        out.append(total // s + 1)
    batch = draw.choice([0, 1, 1, 2, 3])
    taps = kernel[0] * kernel[1]
    offset = sixteenths(draw, batch, 2 * offset_groups * taps, *out, scale=draw.choice([0.3, 2, 9]))
    if draw.one_in(3):
        specials = [0.0, -1.0, 1.0, NAN, INF, -INF, 1e38, -1e38, 2.0**31, -(2.0**31), 1e4]
        offset = with_specials(draw, offset, draw.sample(specials, 2))
    mask = draw.normal(batch, offset_groups * taps, *out)
    return deform_conv_cases.Case(
        input=draw.normal(batch, channels, *size),
        offset=offset,
        weight=draw.normal(out_channels, channels // groups, *kernel) / channels**0.5,
        bias=draw.choice([None, draw.normal(out_channels)]),
        mask=draw.choice([None, mask]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
    )


def pooling(draw: Draw, dyadic: bool) -> roi_pool_cases.Case:
    case = roi_pool_cases.random_case(draw.getrandbits(40))
    if draw.one_in(4) and not dyadic:
        # Channels that fill vectors.
        input = draw.normal(case.input.shape[0], case.input.shape[1] * 17, *case.input.shape[2:])
        case = replace(case, input=input)
    if dyadic:
        samples = draw.choice([1, 2, 2, 4])
        if case.sampling == "aligned" and draw.one_in(3):
            samples = 0
        count = case.boxes.shape[0]
        corners = (case.boxes[:, 1:] * case.spatial_scale * 2).round() * 4
        if case.sampling == "msra":  # which makes an inverted box 0.1 wide
            corners[:, 2:] = corners[:, 2:].maximum(corners[:, :2])
        # Where the number of samples adapts, a bin is as long as a power of two.
        if samples == 0:
            corners[:, 2:] = corners[:, :2] + draw.choice([-8, 0, 8, 16, 32, 64])
        bins = draw.choice([1, 2, 2, 4])
        planes = bins * bins if case.position_sensitive else 1
        groups = 1 if case.offset is None else case.offset.shape[1] // 2
        offset = sixteenths(draw, count, 2 * groups, bins, bins, scale=draw.choice([0.5, 2, 9]))
        channels = case.output_size_of()[1]
        case = replace(
            case,
            input=draw.normal(case.input.shape[0], channels * planes, *case.input.shape[2:]),
            boxes=torch.cat([case.boxes[:, :1], corners], dim=1),
            offset=None if case.offset is None else offset,
            output_size=(bins, bins),
            spatial_scale=0.125,
            gamma=draw.choice([0.125, 1.0, -0.25]),
            samples_per_bin=samples,
        )
        if case.sampling == "msra" and case.samples_per_bin == 0:
            case = replace(case, samples_per_bin=2)
        return case
    if draw.one_in(3):
        # The samples of a bin are counted in the dtype of the map: larger boxes would have more
        # samples than float32 can count.
        values = [NAN, INF, -INF, 1e15, -1e15, 2.0**31, 1e9]
        corners = with_specials(draw, case.boxes[:, 1:], draw.sample(values, 2))
        case = replace(case, boxes=torch.cat([case.boxes[:, :1], corners], dim=1))
    if case.offset is not None and draw.one_in(3):
        specials = [0.0, NAN, INF, -INF, 1e38, -1e38, 2.0**31]
        case = replace(case, offset=with_specials(draw, case.offset, draw.sample(specials, 2)))
    if draw.one_in(10):
        case = replace(case, boxes=case.boxes[:0], offset=None)
    return case


def laid_out(draw: Draw, tensor: Tensor) -> Tensor:
    """The tensor within memory that is NaN otherwise, with a random order of dimensions."""
    kind = draw.choice(["as it is", "last", "strided", "offset", "transposed", "negative"])
    if kind == "last" and tensor.dim() == 4:
        return as_channels_last(tensor)
    if kind == "strided" and tensor.numel() > 0:
        return strided(tensor)
    if kind == "offset":
        room = tensor.new_full((tensor.numel() + 37,), NAN)
        view = room[5 : 5 + tensor.numel()].view(tensor.shape)
        return view.copy_(tensor)
    if kind == "transposed":
        first, second = draw.randrange(tensor.dim()), draw.randrange(tensor.dim())
        return tensor.transpose(first, second).contiguous().transpose(first, second)
    if kind == "negative" and tensor.dtype in (torch.float32, torch.float64):
        # PyTorch negates it only when it is read.
        view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        assert view.is_neg()
        return view
    return tensor


class Guards:
    """Fills tensors that kernels allocate with NaN, and surrounds them with canary values."""

    MARGIN, CANARY = 64, -1.5

    def __init__(self) -> None:
        self.rooms: list[Tensor] = []
        self.makers = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
        self.original = [getattr(owner, name) for owner, name in self.makers]

    def __enter__(self) -> "Guards":
        for (owner, name), create in zip(self.makers, self.original, strict=True):
            setattr(owner, name, self.guarded(create))
        return self

    def __exit__(self, *_error: object) -> None:
        for (owner, name), create in zip(self.makers, self.original, strict=True):
            setattr(owner, name, create)

    def guarded(self, create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*arguments: Any, **options: Any) -> Tensor:
            tensor = create(*arguments, **options)
            here = tensor.device.type == "cpu" and tensor.is_floating_point()
            if not here or tensor.numel() > 10**6:
                return tensor
            room = torch.full((tensor.numel() + 2 * self.MARGIN,), self.CANARY, dtype=tensor.dtype)
            self.rooms.append(room)
            room[self.MARGIN : -self.MARGIN] = NAN
            return room.as_strided(tensor.shape, tensor.stride(), self.MARGIN)

        return make

    def check(self) -> None:
        for room in self.rooms:
            margins = torch.cat([room[: self.MARGIN], room[-self.MARGIN :]])
            if not (margins == self.CANARY).all():
                raise Finding("a kernel wrote outside its result")


def compare(found: Results, wanted: Results, tolerance: float) -> None:
    """Raise unless the same names have the same NaN, and the rest is close."""
    for name, value in wanted.items():
        result = found[name].detach().double()
        if result.shape != value.shape:
            raise Finding(f"{name} has shape {list(result.shape)} instead of {list(value.shape)}")
        if not result.isnan().equal(value.isnan()):
            raise Finding(f"{name} has NaN elsewhere")
        finite = value.isfinite()
        if not finite.any():
            continue
        error = (result[finite] - value[finite]).abs().max()
        error /= value[finite].abs().max().clamp_min(0.1)
        if not error <= tolerance:
            raise Finding(f"{name} is {error:.3g} off")


def check_layouts(case: Case, found: Results, backend: str) -> None:
    def dense(tensor: Tensor, last: bool) -> bool:
        memory_format = torch.channels_last if last else torch.contiguous_format
        return tensor.is_contiguous(memory_format=memory_format)

    if case.input.is_neg():
        return  # PyTorch copies it with another order of dimensions
    last = not case.input.is_contiguous() and dense(case.input, True)
    for name, tensor in found.items():
        follows = name == "grad_input"
        if name == "output":
            follows = isinstance(case, deform_conv_cases.Case)
        elif backend == "reference":
            continue
        if not dense(tensor, last and follows):
            raise Finding(f"{name} has strides {tensor.stride()}")


def right(draw: Draw) -> None:
    """A valid call, with all gradients or some."""
    convolves, border, dyadic = draw.randrange(3) > 0, draw.choice(BORDERS), draw.one_in(2)
    case: Case = convolution(draw) if convolves else pooling(draw, dyadic)
    dtype = draw.choice(DTYPES)
    positions = draw.choice([None, torch.float32]) if dtype in HALVES else None
    if not convolves and dtype in HALVES:
        # Half precision is too coarse for boxes; NaN is preserved.
        positions = torch.float32
    case = case.to(dtype, positions)
    for name, tensor in leaves(case).items():
        if draw.one_in(8):
            case = replace(case, **{name: expanded(draw, tensor)})
    gradient = draw.normal(*output_size(case)).to(dtype)
    if draw.one_in(8):
        gradient = expanded(draw, gradient)
    wanted = definition(case, border, dyadic, gradient)
    names = [field.name for field in fields(case) if isinstance(getattr(case, field.name), Tensor)]
    case = replace(case, **{name: laid_out(draw, getattr(case, name)) for name in names})
    gradient = laid_out(draw, gradient)
    before = [getattr(case, name).clone() for name in names]

    backend = "reference" if draw.one_in(6) else "cpu"
    if backend == "cpu":
        cpu.select_instruction_set(draw.choice(INSTRUCTIONS))
    torch.set_num_threads(draw.choice([1, 1, 1, 2, 3]))
    some = {name: tensor for name, tensor in leaves(case).items() if draw.one_in(2)}
    with Guards() as guards:
        given = {name: tensor.detach().requires_grad_() for name, tensor in some.items()}
        output = public(replace(case, **given), border, backend)
        found = {"output": output}
        if given:
            gradients = torch.autograd.grad(output, list(given.values()), gradient)
            found |= {f"grad_{name}": g for name, g in zip(given, gradients, strict=True)}
    guards.check()
    for name, tensor in found.items():
        owner = leaves(case).get(name.removeprefix("grad_"), case.input)
        if tensor.dtype != owner.dtype:
            raise Finding(f"{name} has dtype {tensor.dtype}")
    compare(found, {name: wanted[name] for name in found}, TOLERANCE[dtype])
    check_layouts(case, found, backend)
    for name, tensor in zip(names, before, strict=True):
        if not getattr(case, name).eq(tensor).logical_or(tensor.isnan()).all():
            raise Finding(f"{name} was modified")


# ---------------------------------------------------------------------------------- extreme calls

INTEGERS: list[Any] = [
    *(0, -1, 1, 2, 5, MOST_PADDING, MOST_PADDING + 1, 10**9, 10**9 + 1, 2**31 - 1, 2**31, 2**32),
    *(2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30),
    *(True, False, 1.0, 1.5, NAN, INF, "1", "", None, 1j, b"1", object()),
    *(np.int64(2), np.int8(-1), np.uint64(2**64 - 1), np.float32(1), np.bool_(True)),
    np.array([1, 2]),
    *(torch.tensor(1), torch.tensor(2.0), torch.tensor([1, 2]), torch.Size([1, 2])),
    *((), (1,), [1, 1], (1, 2, 3), (2**40, 1), (1, 2**40), (1, None), ("a", 1), [[1], [2]]),
    *(10**9 // 3, 2**30, (10**9 // 4, 1), (2**16, 2**16), (2**31, 2**31), 1023, 1024, 1025),
]
NUMBERS: list[Any] = [
    *(0, 0.0, -1.0, 1, True, NAN, INF, -INF, 1e308, 1e-308, 5e-324, -1e308, 10**400, -(10**400)),
    *("1", None, 1j, (), [1.0], np.float32(0.5), np.float16(2), np.int64(1), np.array(0.5)),
    *(torch.tensor(0.5), torch.tensor([0.5, 1]), object()),
]
NAMES: list[Any] = ["", "bin", "zeros ", None, 1, b"bins", ["bins"], np.array(["bins", "a"]), NAN]


def strange(draw: Draw, tensor: Any) -> Any:
    """A value that is not a valid tensor."""
    if not isinstance(tensor, Tensor):
        tensor = torch.ones(draw.choice([(1,), (2, 2), (1, 2, 3, 3), (1, 1, 1, 1)]))
    dim = max(tensor.dim(), 1)
    sizes = list(tensor.shape) or [1]
    axis = draw.randrange(dim)
    many = draw.choice([2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**62])

    def with_size(size: int) -> tuple[int, ...]:
        return (*sizes[:axis], size, *sizes[axis + 1 :])

    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: tensor.tolist(),
        lambda: tensor.float().numpy(),
        lambda: 1.0,
        lambda: "tensor",
        lambda: tensor.to(draw.choice([torch.int64, torch.bool, torch.complex64, torch.uint8])),
        lambda: tensor.to(draw.choice(DTYPES)),
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: tensor.float().to_mkldnn(),
        lambda: torch.nn.Parameter(tensor),
        lambda: tensor.new_empty(with_size(0)),
        lambda: torch.cat([tensor, tensor], axis),
        lambda: tensor.narrow(axis, 0, max(sizes[axis] - 1, 0)),
        lambda: tensor.unsqueeze(axis),
        lambda: tensor.select(axis, 0),
        lambda: tensor.flatten(),
        lambda: tensor.reshape(-1)[0],
        lambda: tensor.new_zeros(()).expand(with_size(many)),
        lambda: tensor.new_zeros(()).expand(*[min(many, 2 ** (62 // dim))] * dim),
        lambda: tensor.new_zeros(with_size(0)).expand(with_size(0)),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
        lambda: torch.complex(tensor.float(), tensor.float()).real,
        lambda: [tensor, tensor],
        lambda: tensor * draw.choice([NAN, INF, 1e30, -1e30, 0]),
        lambda: tensor + draw.choice([NAN, INF, 2.0**31, -1, 0.5, 1e38]),
    ]
    try:
        return draw.choice(kinds)()
    except (RuntimeError, IndexError):
        return None  # there is no such tensor


def matching_offset(arguments: dict[str, Any]) -> Tensor | None:
    """An offset for a changed geometry, whose numbers share one place in memory."""
    try:
        (kh, kw), offset = arguments["weight"].shape[2:], arguments["offset"]
        numbers = [arguments[name] for name in ("stride", "padding", "dilation")]
        pairs = [n if isinstance(n, (tuple, list)) else (n, n) for n in numbers]
        stride, padding, dilation = [tuple(map(int, n)) for n in pairs]
        sides = arguments["input"].shape[2:]
        reach = [dilation[k] * (size - 1) + 1 for k, size in enumerate((kh, kw))]
        out = [(sides[k] + 2 * padding[k] - reach[k]) // stride[k] + 1 for k in (0, 1)]
        return offset.new_zeros(()).expand(*offset.shape[:2], *map(int, out))
    except (AttributeError, ArithmeticError, IndexError, TypeError, ValueError, RuntimeError):
        return None


def extreme(draw: Draw) -> None:
    """A valid call in which one or two arguments are replaced by extreme ones."""
    convolves = draw.one_in(2)
    case: Case = convolution(draw) if convolves else pooling(draw, False)
    dtype = draw.choice(DTYPES)
    case = case.to(dtype)
    arguments = {field.name: getattr(case, field.name) for field in fields(case)}
    if convolves:
        arguments["border"] = draw.choice(BORDERS)
        tensors, ints = [*deform_conv_cases.NAMES], ["stride", "padding", "dilation"]
        floats, names, function = [], ["border"], deform_conv2d
    else:
        tensors, ints = ["input", "boxes", "offset"], ["output_size", "samples_per_bin"]
        floats, names = ["spatial_scale", "gamma"], ["sampling"]
        function = deform_ps_roi_pool if arguments.pop("position_sensitive") else deform_roi_pool
    names.append("backend")
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice([*tensors, *ints, *ints, *floats, *names])
        if name in tensors:
            arguments[name] = strange(draw, arguments[name])
        else:
            values = INTEGERS if name in ints else NUMBERS if name in floats else NAMES
            arguments[name] = draw.choice(values)
        if convolves and name in ints and draw.one_in(2):
            if draw.one_in(2):
                arguments["stride"] = draw.choice([2**20, MOST_PADDING, 10**8, (10**8, 1)])
            arguments["mask"] = None
            if draw.one_in(2):
                arguments["offset"] = matching_offset(arguments)
    try:
        output = function(**arguments)
    except ERRORS:
        return
    samples = arguments.get("samples_per_bin", 1)
    if output.numel() * samples**2 > 10**7 or output.device.type != "cpu":
        return  # the reference would take minutes
    try:
        exactly = {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in arguments.items()
        }
        wanted = function(**{**exactly, "backend": "reference"}).detach()
    except (RuntimeError, MemoryError):
        return  # of memory
    # Overflow of the dtype, and differences of huge numbers, are not tested here.
    result = output.detach().double()
    small = wanted.isfinite() & result.isfinite() & (wanted.abs() < 1e3)
    if not (result.isnan() | result.isinf() | wanted.isfinite()).all():
        raise Finding("a finite number where the reference has none")
    if small.any():
        compare({"": result[small]}, {"": wanted[small]}, 10 * TOLERANCE[output.dtype])


def operator(draw: Draw) -> None:
    """The registered operators, which check what the public functions have not checked."""
    convolves, backward = draw.one_in(2), draw.one_in(2)
    case: Case = convolution(draw) if convolves else pooling(draw, False)
    case = case.to(draw.choice(DTYPES))
    arguments = [*case.operator, draw.choice(BORDERS)] if convolves else list(case.operator)
    called = (DEFORM_CONV if convolves else ROI_POOL).forward
    if backward:
        called = (DEFORM_CONV if convolves else ROI_POOL).backward
        if convolves:
            del arguments[3]  # bias
        arguments.insert(0, draw.normal(*output_size(case)).to(case.input.dtype))
        arguments.append([draw.one_in(2) for _ in range(5 if convolves else 2)])
    for _ in range(draw.choice([0, 1, 1, 2])):
        at = draw.randrange(len(arguments))
        value = arguments[at]
        if isinstance(value, Tensor) or value is None:
            arguments[at] = strange(draw, value)
        elif isinstance(value, (tuple, int)):
            arguments[at] = draw.choice(INTEGERS)
        else:
            arguments[at] = draw.choice(NAMES if isinstance(value, str) else NUMBERS)
    with Guards() as guards:
        try:
            called(*arguments)
        except ERRORS:
            return
    guards.check()


INSTRUCTIONS = []


def make(seed: int, index: int) -> None:
    draw = Draw(f"{seed}/{index}")
    torch.manual_seed(index)
    try:
        draw.choice([right, right, right, extreme, extreme, operator])(draw)
    except Finding as finding:
        print(f"finding {index}: {finding}", flush=True)
    except Exception:
        # Including undocumented errors.
        text = " | ".join(traceback.format_exc().strip().splitlines()[-5:])
        print(f"finding {index}: {text}", flush=True)


def main() -> None:
    seed, first, end = map(int, sys.argv[1:])
    warnings.simplefilter("ignore")  # of what is deprecated in PyTorch
    best = cpu.instruction_set()
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "baseline"):
        try:
            cpu.select_instruction_set(name)
            INSTRUCTIONS.append(name)
        except ValueError:
            pass
    cpu.select_instruction_set(best)
    # A sanitizer reserves more memory than any limit.
    if "libasan" not in Path("/proc/self/maps").read_text():
        have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (have + MOST_MEMORY, have + MOST_MEMORY))
    for index in range(first, end):
        print(f"call {index}", flush=True)
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        make(seed, index)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
