"""Registration of operators with PyTorch.

Schema, kernels, fakes, gradients, vmap, autocast, FLOPs, and the forms in exported programs.

Each operator's folder declares an `Operator`; the rules that all operators share are here.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library

from deformnet.ops import backends
from deformnet.ops._arguments import check_tensor
from deformnet.ops.flops import register as register_flops
from deformnet.ops.onnx import in_onnx_export, refuse_legacy_export
from deformnet.ops.triton import DEVICE_TYPES

_library = Library("deformnet", "DEF")
_operators: list["Operator"] = []

# Maximum number of cached plans per operator, a kilobyte each.
_MOST_PLANS = 1000


def _settings_alone(*arguments: Any) -> Any:
    return arguments[-1]


class Kernels(NamedTuple):
    """A fast implementation of an operator.

    Attributes:
        forward: `forward(*tensors, plan)` returns the output.
        backward: `backward(grad_output, *saved_tensors, settings, needs)` returns a gradient for
            each differentiable tensor, None where `needs` says False.
        plan: `plan(*tensors, settings)` returns what `forward` needs besides the tensors. Plans are
            cached and shared by calls: they do not depend on values, and no call modifies them.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor | None, ...]]
    plan: Callable[..., Any] = _settings_alone


class Operator:
    """An operator `torch.ops.deformnet.NAME`, and NAME_backward for its gradients.

    Creating an instance registers both: kernels with argument checks, fake implementations,
    derivatives (the first by the kernels; second and forward-mode ones by the reference), vmap,
    autocast, and FLOP formulas. The public function calls the instance with its arguments.

    Args:
        name: name of the operator.
        schema: arguments of the operator, the tensors first.
        settings: a NamedTuple of the non-tensor arguments.
        check: `check(*tensors, settings)` returns the shape of the output, or raises if an
            argument is wrong. Sizes may be symbolic, and values unknown.
        check_values: `check_values(*tensors)` raises if a value is wrong, if checking it needs no
            synchronization.
        differentiable: names of the tensors that have gradients.
        positions: names of the tensors that autocast casts to float32 instead of its own dtype.
        biases: names of the tensors with one number per output channel that are added to the
            output. The backward pass does not take them.
        rows: names of the tensors whose first dimension, of images or boxes, can also hold the
            samples of `torch.vmap`. If others are batched, the operator runs once per sample.
        fold: `fold(*tensors)` takes the tensors, those in `rows` with an additional leading
            dimension of samples, and flattens their first two dimensions.
        keeps_memory_format: whether the output is channels-last if the first tensor is.
        reference: `reference(*tensors, settings)`, in plain PyTorch.
        standard: the same for exported programs, without data-dependent shapes.
        onnx: the same for ONNX graphs; it may contain `torch.onnx.ops.symbolic`.
        cpu: the kernels for tensors on the CPU.
        triton: imports the kernels for tensors on a GPU.
        flops: `flops(*tensors, settings)` returns floating-point operations of the forward pass.
        backward_flops: `backward_flops(*saved_tensors, settings, needs)`, of the backward pass.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        settings: Callable[..., tuple[Any, ...]],
        *,
        check: Callable[..., tuple[int, ...]],
        check_values: Callable[..., None] | None = None,
        differentiable: Sequence[str],
        positions: Sequence[str],
        biases: Sequence[str] = (),
        rows: Sequence[str],
        fold: Callable[..., tuple[Tensor | None, ...]],
        keeps_memory_format: bool,
        reference: Callable[..., Tensor],
        standard: Callable[..., Tensor],
        onnx: Callable[..., Tensor],
        cpu: Kernels,
        triton: Callable[[], Kernels],
        flops: Callable[..., int],
        backward_flops: Callable[..., int],
    ) -> None:
        arguments = schema.split(", ")
        names = re.findall(r"Tensor\?? (\w+)", schema)
        self.name, self._settings = name, settings
        self._check, self._check_values = check, check_values
        self._keeps_memory_format = keeps_memory_format
        self._reference, self.cpu, self.triton = reference, cpu, triton
        self._standard, self._onnx = standard, onnx
        self._flops, self._backward_flops = flops, backward_flops
        self._count = len(names)
        self._is_position = [name in positions for name in names]
        self._is_row = [name in rows for name in names]
        self._fold = fold
        # Places of tensors among the arguments.
        self._biases = [names.index(name) for name in biases]
        self._differentiable = [names.index(name) for name in differentiable]
        self._take_differentiable = itemgetter(*self._differentiable)
        saved_names = [name for name in names if name not in biases]
        self._saved = [names.index(name) for name in saved_names]
        self._take_saved = itemgetter(*self._saved)
        # Places among the saved tensors; None: not saved.
        self._with_gradient = [
            None if name in biases else saved_names.index(name) for name in differentiable
        ]
        self._plans: dict[tuple[Any, ...], Any] = {}
        self._optional = [
            (name, need, place)
            for need, (name, place) in enumerate(
                zip(differentiable, self._with_gradient, strict=True)
            )
            if place is not None and f"Tensor? {name}" in schema
        ]
        saved = [argument for argument in arguments if argument.split()[1] not in biases]
        self._define(name, f"{schema}) -> Tensor")
        self._define(
            f"{name}_backward",
            f"Tensor grad_output, {', '.join(saved)}, bool[{len(differentiable)}] needs) "
            "-> Tensor[]",
        )
        self._register()

    def _define(self, name: str, signature: str) -> None:
        _library.define(f"{name}({signature}", tags=torch.Tag.pt2_compliant_tag)

    def _register(self) -> None:
        name, backward = self.name, f"{self.name}_backward"
        for device in ("cpu", *DEVICE_TYPES):
            key = device.upper()
            _library.impl(name, self._kernel, key)
            _library.impl(backward, self._backward_kernel, key)
            _library.impl(name, partial(self._autocast_kernel, device), f"Autocast{key}")
        _library.impl(name, self._autograd_kernel, "Autograd")
        _library.impl(backward, self._backward_autograd_kernel, "Autograd")
        torch.library.register_fake(f"deformnet::{name}", self._fake, lib=_library)
        torch.library.register_fake(f"deformnet::{backward}", self._backward_fake, lib=_library)
        packets = getattr(torch.ops.deformnet, name), getattr(torch.ops.deformnet, backward)
        register_flops(packets[0], self._count_flops)
        register_flops(packets[1], self._count_backward_flops)
        # The overloads, resolved once and not in every call.
        self.forward, self.backward = packets[0].default, packets[1].default
        _operators.append(self)
        # By hand, as torch.library.register_autograd adds twice this overhead.
        title = "".join(word.capitalize() for word in name.split("_"))
        self._function = _function(title, self._save_and_call, self._differentiate)
        self._direct_function = _function(title, self._save_and_call_kernel, self._differentiate)
        self._backward_function = _function(
            f"{title}Gradients", self._save_and_call_backward, self._differentiate_twice
        )
        for operator, rule in ((name, self._vmap), (backward, self._vmap_backward)):
            torch.library.register_vmap(f"deformnet::{operator}", rule, lib=_library)
        _library.impl(backward, self._legacy_vmap_backward, "Batched")

    # ------------------------------------------------------------------------ the public function

    def __call__(
        self, backend: str, tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...]
    ) -> Tensor:
        """Check the arguments, cast them under autocast, and run an implementation."""
        input = tensors[0]
        if not isinstance(input, Tensor):
            raise TypeError(f"expected input to be a tensor, but got {type(input).__name__}")
        device = input.device.type
        reference = backends.resolve(backend, device) == "reference"
        if backends.autocast_enabled(device):
            tensors = self._autocast(device, tensors)
            # The casts are done; the reference must not have its own arithmetic cast as well.
            with torch.autocast(device, enabled=False):
                return self._run(reference, tensors, settings)
        return self._run(reference, tensors, settings)

    def _run(
        self, reference: bool, tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...]
    ) -> Tensor:
        if not reference and _plain(tensors):
            # Skips the dispatcher's two calls into Python, half the time of a small call.
            plan = self._checked_plan(tensors, settings)
            needed = _needs_gradient(self._take_differentiable(tensors))
            if needed and not torch.is_inference_mode_enabled():
                return self._direct_function.apply(*tensors, plan, settings)
            return self._call_kernel(self.cpu, tensors, plan)
        self._check(*tensors, settings)
        # Only while exporting, as the second check takes a microsecond.
        if torch.compiler.is_exporting() and in_onnx_export():
            return self._onnx(*tensors, settings)
        if not reference:
            if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
                refuse_legacy_export()
            return self.forward(*tensors, *settings)
        if self._check_values is not None:
            self._check_values(*tensors)
        output = self._reference(*tensors, settings)
        return output.contiguous(memory_format=self._memory_format(tensors[0]))

    def _checked_plan(self, tensors: tuple[Any, ...], settings: tuple[Any, ...]) -> Any:
        """The CPU kernel's plan for plain tensors, cached; a cached plan skips their check."""
        signature = [t if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
        key = (settings, torch.get_num_threads(), *signature)
        try:
            plan = self._plans.get(key)
        except TypeError:  # an unhashable setting, which the check rejects
            plan = None
        if plan is None:
            self._check(*tensors, settings)
            plan = self.cpu.plan(*tensors, settings)
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    # -------------------------------------------------------------------------------- the kernels

    def _kernels(self, input: Tensor) -> Kernels:
        on_cpu = input.is_cpu
        reason = backends.CPU_UNAVAILABLE if on_cpu else backends.why_unavailable("triton")
        if reason is not None:
            raise RuntimeError(reason)
        return self.cpu if on_cpu else self.triton()

    def _kernel(self, *arguments: Any) -> Tensor:
        tensors, settings = arguments[: self._count], self._settings(*arguments[self._count :])
        # Again, after the public function: a compiled or exported program comes straight here.
        self._check(*tensors, settings)
        kernels = self._kernels(tensors[0])
        return self._call_kernel(kernels, tensors, kernels.plan(*tensors, settings))

    def _call_kernel(self, kernels: Kernels, tensors: Sequence[Any], plan: Any) -> Tensor:
        if self._check_values is not None:
            self._check_values(*tensors)
        return kernels.forward(*tensors, plan)

    def _backward_kernel(self, *arguments: Any) -> list[Tensor]:
        gradients = self._call_backward_kernel(*self._split(arguments))
        return [gradient for gradient in gradients if gradient is not None]

    def _call_backward_kernel(
        self, grad_output: Tensor, saved: tuple, settings: tuple, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        self._check_backward(grad_output, saved, settings, needs)
        kernels = self._kernels(grad_output)
        if self._check_values is not None:
            self._check_values(*saved)
        return kernels.backward(grad_output, *saved, settings, tuple(needs))

    def _split(self, arguments: tuple[Any, ...]) -> tuple[Tensor, tuple, tuple, Sequence[bool]]:
        """The arguments of the backward operator: gradient, saved tensors, settings, needs."""
        end = 1 + len(self._saved)
        return arguments[0], arguments[1:end], self._settings(*arguments[end:-1]), arguments[-1]

    def _check_backward(
        self, grad_output: Tensor, saved: tuple, settings: tuple, needs: Sequence[bool]
    ) -> None:
        shape, input = self._check(*self._with_biases(saved), settings), saved[0]
        check_tensor("grad_output", grad_output, len(shape), input)
        if grad_output.shape != shape:
            raise ValueError(
                f"expected grad_output to have shape {list(shape)}, "
                f"but got shape {list(grad_output.shape)}"
            )
        count = len(self._with_gradient)
        if len(needs) != count:
            raise ValueError(f"expected needs to have {count} values, but got {list(needs)}")
        for name, need, place in self._optional:
            if saved[place] is None and needs[need]:
                raise ValueError(f"expected needs to be False for {name}=None, but got True")

    def _with_biases(self, saved: Sequence[Any]) -> list[Any]:
        """One item per tensor of the operator, from those of the saved tensors; None for biases."""
        tensors = list(saved)
        for place in self._biases:
            tensors.insert(place, None)
        return tensors

    # ---------------------------------------------------------------------------------- the fakes

    def _memory_format(self, input: Tensor | None) -> torch.memory_format:
        if input is None or not self._keeps_memory_format:
            return torch.contiguous_format
        if not torch.compiler.is_compiling() and _transforming():
            return torch.contiguous_format  # vmap supports no other format
        return _memory_format(input)

    def _fake(self, *arguments: Any) -> Tensor:
        tensors, settings = arguments[: self._count], self._settings(*arguments[self._count :])
        input = tensors[0]
        return torch.empty(
            self._check(*tensors, settings),
            dtype=input.dtype,
            device=input.device,
            memory_format=self._memory_format(input),
        )

    def _backward_fake(self, *arguments: Any) -> list[Tensor]:
        grad_output, saved, settings, needs = self._split(arguments)
        self._check_backward(grad_output, saved, settings, needs)
        places = [p for p, needed in zip(self._with_gradient, needs, strict=True) if needed]
        return [
            grad_output.new_empty(grad_output.shape[1])
            if place is None
            else torch.empty_like(
                saved[place],
                memory_format=torch.contiguous_format if place else _memory_format(saved[0]),
            )
            for place in places
        ]

    # -------------------------------------------------------------------------- exported programs

    def standard_form(self, *arguments: Any) -> Tensor:
        """The operator in standard operators."""
        return self._standard(*arguments[: self._count], self._settings(*arguments[self._count :]))

    def onnx_form(self, *arguments: Any) -> Tensor:
        """The operator in ONNX graphs."""
        return self._onnx(*arguments[: self._count], self._settings(*arguments[self._count :]))

    # ------------------------------------------------------------------------------- derivatives

    def _autograd_kernel(self, *arguments: Any) -> Tensor:
        tensors, settings = arguments[: self._count], self._settings(*arguments[self._count :])
        differentiable = self._take_differentiable(tensors)
        if _have_tangents(differentiable):
            return self._run(True, tensors, settings)
        if _needs_gradient(differentiable):
            return _apply(self._function, (*tensors, settings))
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward(*arguments)

    def _save_and_call(self, ctx: Any, *arguments: Any) -> Tensor:
        self._save(ctx, arguments)
        *tensors, settings = arguments
        return _below_autograd(self.forward, (*tensors, *settings))

    def _save_and_call_kernel(self, ctx: Any, *arguments: Any) -> Tensor:
        self._save(ctx, arguments)
        *tensors, plan, _ = arguments
        return self._call_kernel(self.cpu, tensors, plan)

    def _save(self, ctx: Any, arguments: tuple[Any, ...]) -> None:
        # The inputs alone: what is interpolated from them is cheaper to compute again than to keep.
        ctx.save_for_backward(*self._take_saved(arguments))
        ctx.settings = arguments[-1]

    def _differentiate(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = self._take_differentiable(ctx.needs_input_grad)
        saved, settings = ctx.saved_tensors, ctx.settings
        if not torch.is_grad_enabled() and _plain((grad_output, *saved)):
            gradients = self._call_backward_kernel(grad_output, saved, settings, needs)
        else:
            # Within forward mode, a tensor may have a tangent at any level of torch.func.
            dual = forward_ad._current_level >= 0
            backward = self._reference_backward if dual else self.backward
            found = iter(backward(grad_output, *saved, *settings, needs))
            gradients = [next(found) if needed else None for needed in needs]
        return tuple(_replaced([None] * len(ctx.needs_input_grad), self._differentiable, gradients))

    def _backward_autograd_kernel(self, *arguments: Any) -> list[Tensor]:
        saved = (arguments[1 + p] for p in self._with_gradient if p is not None)
        tensors = [arguments[0], *saved]
        if _have_tangents(tensors):
            raise NotImplementedError(
                f"{self.name}_backward has no forward-mode derivative; "
                "call the backward pass through autograd"
            )
        if _needs_gradient(tensors):
            return list(_apply(self._backward_function, arguments))
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward(*arguments)

    def _save_and_call_backward(self, ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        end = 1 + len(self._saved)
        ctx.save_for_backward(*arguments[:end])
        ctx.others = arguments[end:]
        ctx.set_materialize_grads(False)
        return tuple(_below_autograd(self.backward, arguments))

    def _differentiate_twice(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The second derivative: recomputes the reference's first one and differentiates it."""
        device = next((grad.device.type for grad in grads if grad is not None), "meta")
        if backends.autocast_enabled(device):  # this pass may run in another context than the first
            with torch.autocast(device, enabled=False):
                return self._differentiate_twice(ctx, *grads)
        *settings, needs = ctx.others
        of_needed = iter(grads)
        needs = tuple(needed and next(of_needed) is not None for needed in needs)
        if not any(needs):
            return (None,) * len(ctx.needs_input_grad)
        arguments = [*ctx.saved_tensors, *settings, needs]
        places = [0, *(1 + place for place in self._with_gradient if place is not None)]
        places = [place for place in places if ctx.needs_input_grad[place]]

        def backward(*values: Tensor) -> tuple[Tensor, ...]:
            return self._reference_backward(*_replaced(arguments, places, values))

        pull = torch.func.vjp(backward, *[arguments[place] for place in places])[1]
        found = pull(tuple(grad for grad in grads if grad is not None))
        return tuple(_replaced([None] * len(arguments), places, found))

    def _reference_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The same as the backward operator, in differentiable operations."""
        grad_output, saved, settings, needs = self._split(arguments)
        device = grad_output.device.type
        if backends.autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._reference_backward(*arguments)
        tensors = self._with_biases(saved)
        for place in self._biases:  # no gradient depends on their values
            tensors[place] = grad_output.new_zeros(grad_output.shape[1])
        places = [p for p, needed in zip(self._differentiable, needs, strict=True) if needed]

        def forward(*values: Tensor) -> Tensor:
            return self._reference(*_replaced(tensors, places, values), settings)

        return torch.func.vjp(forward, *[tensors[place] for place in places])[1](grad_output)

    # -------------------------------------------------------------------------------------- vmap

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple:
        if info.batch_size == 0:
            output, _ = self._vmap(*_one_sample(info, in_dims, arguments))
            return output[:0], 0
        tensors = _samples_first(arguments[: self._count], in_dims)
        settings = arguments[self._count :]
        batched = [dim is not None for dim in in_dims[: self._count]]
        if any(wide and not row for wide, row in zip(batched, self._is_row, strict=True)):
            calls = [self.forward(*some, *settings) for some in _each(tensors, batched)]
            return torch.stack(calls), 0
        folded = self._fold(*self._spread(tensors, batched, info.batch_size))
        return _unfold(self.forward(*folded, *settings), info.batch_size), 0

    def _vmap_backward(self, info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple:
        if info.batch_size == 0:
            gradients, dims = self._vmap_backward(*_one_sample(info, in_dims, arguments))
            return [gradient[:0] for gradient in gradients], dims
        end = 1 + len(self._saved)
        grad_output, *saved = _samples_first(arguments[:end], in_dims)
        others, needs = arguments[end:], arguments[-1]
        batched = [dim is not None for dim in in_dims[:end]]
        wide = [self._saved[i] for i in range(len(saved)) if batched[1 + i]]
        wide += [place for place, need in zip(self._differentiable, needs, strict=True) if need]
        if not all(self._is_row[place] for place in wide):
            calls = [
                self.backward(*some, *others) for some in _each((grad_output, *saved), batched)
            ]
            gradients = [torch.stack(some) for some in zip(*calls, strict=True)]
        else:
            tensors = self._with_biases(saved)
            flags = self._with_biases(batched[1:])
            folded = self._fold(*self._spread(tensors, flags, info.batch_size))
            if not batched[0]:
                grad_output = grad_output.expand(info.batch_size, *grad_output.shape)
            found = self.backward(grad_output.flatten(0, 1), *self._take_saved(folded), *others)
            gradients = [_unfold(gradient, info.batch_size) for gradient in found]
        return gradients, [0] * len(gradients)

    def _spread(
        self, tensors: Sequence[Tensor | None], batched: Sequence[Any], size: int
    ) -> list[Tensor | None]:
        """The tensors, where all those in `rows` have a leading dimension of samples."""
        return [
            t.expand(size, *t.shape) if row and t is not None and not wide else t
            for t, row, wide in zip(tensors, self._is_row, batched, strict=True)
        ]

    def _legacy_vmap_backward(self, *arguments: Any) -> list[Tensor]:
        """The backward pass under `is_grads_batched=True`, which uses its own vmap."""
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        in_dims = [
            0 if isinstance(a, Tensor) and is_legacy_batchedtensor(a) else None for a in arguments
        ]
        unwrap = torch._remove_batch_dim  # pyright: ignore[reportPrivateImportUsage]
        wrap = torch._add_batch_dim  # pyright: ignore[reportPrivateImportUsage]
        pairs = zip(arguments, in_dims, strict=True)
        plain = [a if dim is None else unwrap(a, level, 1, dim) for a, dim in pairs]
        found = torch.vmap(self.backward, tuple(in_dims))(*plain)
        return [wrap(gradient, 0, level) for gradient in found]

    # ---------------------------------------------------------------------------------- autocast

    def _autocast(self, device: str, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Tensors cast as under autocast; float64 stays float64, as in PyTorch's operators."""
        low = torch.get_autocast_dtype(device)
        pairs = zip(tensors, self._is_position, strict=True)
        return tuple([_cast(t, torch.float32 if position else low) for t, position in pairs])

    def _autocast_kernel(self, device: str, *arguments: Any) -> Tensor:
        tensors = self._autocast(device, arguments[: self._count])
        with torch.autocast(device, enabled=False):
            return self.forward(*tensors, *arguments[self._count :])

    # ------------------------------------------------------------------------------------- FLOPs

    def _count_flops(self, *arguments: Any, out_val: Any) -> int:
        return self._flops(*arguments[: self._count], self._settings(*arguments[self._count :]))

    def _count_backward_flops(self, *arguments: Any, out_val: Any) -> int:
        _, saved, settings, needs = self._split(arguments)
        return self._backward_flops(*saved, settings, needs)


def decompositions(*, onnx: bool = False) -> dict[Any, Callable[..., Tensor]]:
    """A decomposition table that replaces deformnet's operators in an exported program.

    The program then runs where deformnet is not installed, but is slower and uses more memory::

        program = torch.export.export(model, (images,))
        program = program.run_decompositions(deformnet.ops.decompositions())

    `torch.onnx.export(model, ...)` needs no table; `torch.onnx.export(program, ...)` does.

    Args:
        onnx: replace deformable convolution with ONNX's DeformConv, for `torch.onnx.export` of the
            program to opset 19 or newer; otherwise with standard operators.
    """
    return {it.forward: it.onnx_form if onnx else it.standard_form for it in _operators}


def _dispatch_state() -> tuple[int, int]:
    state = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return state[0].raw_repr(), state[1].raw_repr()


def _usual_keys() -> tuple[set[tuple[int, int]], set[int]]:
    """States of the dispatcher outside any mode, and dispatch keys of dense CPU tensors."""
    states, keys = set(), set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            states.add(_dispatch_state())
            keys.add(torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr())
    return states, keys


# In a new thread, because this module may be imported inside a mode.
with ThreadPoolExecutor(1) as _pool:
    _USUAL_STATES, _USUAL_KEYS = _pool.submit(_usual_keys).result()


def _plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would do nothing but select a CPU kernel and its derivative.

    If not, a mode, a transform, a profiler or a tensor type has to intercept the call first.
    """
    if (
        torch.compiler.is_compiling()
        or _dispatch_state() not in _USUAL_STATES
        or forward_ad._current_level >= 0
        or _profiler_enabled()
    ):
        return False
    # Not all(...), whose generator takes a microsecond.
    for tensor in tensors:
        if tensor is not None and (
            not isinstance(tensor, Tensor)
            or torch._C._dispatch_keys(tensor).raw_repr() not in _USUAL_KEYS
        ):
            return False
    return True


# Whether a transform of torch.func is active.
_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


def _function(name: str, forward: Callable, backward: Callable) -> type[Any]:
    # The kernels of autograd are called once for each level of torch.func, as these functions are.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (_SingleLevelFunction,), methods)


def _apply(function: type[Any], arguments: Sequence[Any]) -> Any:
    if not _transforming():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def _below_autograd(operator: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call an operator from within an autograd function."""
    with torch._C._AutoDispatchBelowAutograd():
        if not _transforming():
            return operator(*arguments)
        # The function has disabled derivatives, including those of other levels of torch.func.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return operator(*arguments)


def _have_tangents(tensors: Sequence[Tensor | None]) -> bool:
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _replaced(items: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """A copy of a list with other values in some places."""
    copy = list(items)
    for place, value in zip(places, values, strict=True):
        copy[place] = value
    return copy


def _samples_first(tensors: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    # There may be more dims than tensors: those of the other arguments.
    return [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=False)]


def _one_sample(info: Any, dims: Sequence[int | None], arguments: Sequence[Any]) -> list[Any]:
    """The arguments of a rule of vmap without samples, with a sample of zeros, for its shapes."""
    zeros = [
        a.new_zeros(*a.shape[:dim], 1, *a.shape[dim + 1 :]) if isinstance(dim, int) else a
        for a, dim in zip(arguments, dims, strict=True)
    ]
    return [info._replace(batch_size=1), dims, *zeros]


def _each(tensors: Sequence[Any], batched: Sequence[bool]) -> list[list[Any]]:
    """The tensors of each sample."""
    size = max(len(t) for t, wide in zip(tensors, batched, strict=True) if wide)
    return [
        [t[i] if wide else t for t, wide in zip(tensors, batched, strict=True)] for i in range(size)
    ]


def _unfold(tensor: Tensor, samples: int) -> Tensor:
    return tensor.unflatten(0, (samples, tensor.shape[0] // samples))


def _needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and True in [t.requires_grad for t in tensors if t is not None]


def _memory_format(tensor: Tensor) -> torch.memory_format:
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # What is not a tensor at all is left for the checks to refuse.
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
