"""The interface of backbones, and their dilation, freezing and deformable layers.

Dai et al. 2017, section 2.3, "Deformable Convolution for Feature Extraction".
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deformnet._errors import UserError, users_values
from deformnet.nn import deform_
from deformnet.nn.offsets import OffsetConv
from deformnet.ops._arguments import one_of, positive

Norm = Literal["frozen", "trained"]
OutputStride = Literal[8, 16, 32]


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's frozen batch norm on PyTorch's own kernel.

    It reads the map once rather than twice, and keeps the dtype of a half-precision input, which
    torchvision's formula promotes to float32.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


NormLayer = type[FrozenBatchNorm2d] | type[nn.BatchNorm2d]


class Published(Protocol):
    """Weights that can be downloaded: torchvision's `WeightsEnum`, or weights on timm's hub."""

    @property
    def url(self) -> str: ...

    def get_state_dict(self, *, check_hash: bool) -> Mapping[str, Any]: ...


class Backbone(nn.Module):
    """Abstract base class: a classification network without its classifier.

    Unit (i, j) of its feature maps is centered on pixel (stride * i, stride * j) of the image.

    A subclass builds its stages and then calls `_add_reduction`. If the stride of its conv5 differs
    from `output_stride`, it sets `stride`.

    Args:
        conv4_channels: Channels of conv4.
        conv5_channels: Channels of conv5.
        output_stride: Stride of conv5, in pixels of the image: 16 in dense prediction, where conv5
            keeps the resolution of conv4, 8 where conv4 also keeps that of conv3, or 32 in
            classification.
        reduce_channels: Output channels of the randomly initialized 1x1 convolution and ReLU after
            conv5; None leaves both out.

    Attributes:
        name: Name of the backbone in messages.
        published: Downloadable weights by name.
        stride: Stride of conv5, in pixels of the image.
        out_channels: Channels of the output.

    Raises:
        ValueError: If `output_stride` or `reduce_channels` is out of range.
    """

    name: str
    published: Mapping[str, Published] = MappingProxyType({})
    counted = "3x3 convolutions"
    """What `deform_last` counts, in messages."""
    recall: Callable[[Tensor], Tensor] | None = None
    """Looks up the `maps` of images, which are then not computed."""

    def __init__(
        self,
        conv4_channels: int,
        conv5_channels: int,
        output_stride: OutputStride,
        reduce_channels: int | None,
    ) -> None:
        one_of("output_stride", output_stride, get_args(OutputStride))
        if reduce_channels is not None and reduce_channels < 1:
            raise ValueError(
                f"expected reduce_channels to be at least 1 or None, but got {reduce_channels}"
            )
        super().__init__()
        self.conv4_channels = conv4_channels
        self.conv5_channels = conv5_channels
        self.stride: int = output_stride
        self._conv4_stride = min(16, output_stride)
        self.out_channels = conv5_channels if reduce_channels is None else reduce_channels
        self._reduces = reduce_channels is not None

    def _add_reduction(self) -> None:
        """Build the 1x1 convolution, after all stages.

        The optimizer state of checkpoints depends on the order of parameters.
        """
        self.reduce: nn.Conv2d | None = None
        if self._reduces:
            self.reduce = nn.Conv2d(self.conv5_channels, self.out_channels, 1)
            initialize(self.reduce)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, out_channels, ceil(H/stride), ceil(W/stride)]."""
        _, conv5 = self.stages(images)
        return self.reduced(conv5)

    def stages(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Feature maps of conv4 (at stride 16, or 8) and conv5 of normalized images [N, 3, H, W].

        Args:
            images: The images, or `maps` in their place.

        Raises:
            ValueError: If `images` has another number of dimensions or channels.
        """
        if (maps := self.known(images)) is None:
            return self._computed(images)
        return self._of_maps(maps)

    def maps(self, images: Tensor) -> Tensor:
        """What `freeze(5)` keeps from changing: feature maps [N, map_channels, H, W].

        Those of conv4 and conv5, joined. For output strides 8 and 16.
        """
        return torch.cat(self._computed(images), dim=1)

    def known(self, images: Tensor) -> Tensor | None:
        """The `maps` that need no computation: those in place of images, or what `recall` finds."""
        if images.ndim == 4 and images.shape[1] == self.map_channels:
            return images.float()
        return None if self.recall is None else self.recall(images).float()

    @property
    def map_channels(self) -> int:
        """Channels of `maps`."""
        return self.conv4_channels + self.conv5_channels

    def frozen_modules(self) -> nn.ModuleList:
        """The modules that compute `maps`."""
        names = chain.from_iterable(self.trunk_stages)
        return nn.ModuleList([*map(self.get_submodule, names), self.conv5_stage])

    @property
    def frozen(self) -> bool:
        """Whether `maps` do not change in training (frozen stages have frozen batch norm)."""
        return not any(weight.requires_grad for weight in self.frozen_modules().parameters())

    def _computed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        conv4 = self.conv4(images)
        return conv4, self.conv5_stage(conv4)

    def _of_maps(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        conv4, conv5 = maps.split([self.conv4_channels, self.conv5_channels], dim=1)
        return conv4, conv5

    def reduced(self, conv5: Tensor) -> Tensor:
        """The output of `forward` from the feature map of conv5, [N, out_channels, H, W]."""
        return conv5 if self.reduce is None else F.relu(self.reduce(conv5), inplace=True)

    def freeze_conv5(self) -> None:
        """Freeze conv5 and the channel reduction, for networks that stop at conv4."""
        self.conv5_stage.requires_grad_(False)
        if self.reduce is not None:
            self.reduce.requires_grad_(False)

    @property
    @abstractmethod
    def conv5_stage(self) -> nn.Module:
        """The module of conv5, from the feature map of conv4 to [N, conv5_channels, H, W]."""

    @abstractmethod
    def conv4(self, images: Tensor) -> Tensor:
        """Feature map [N, conv4_channels, ceil(H/16), ceil(W/16)] of conv4; see `stages`.

        At output stride 8, [N, conv4_channels, ceil(H/8), ceil(W/8)].
        """

    def filters(self) -> list[str]:
        """Names of the convolutions that `deform_last` counts, from the input to the output."""
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
        ]

    def own_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict with this backbone's names, converted from one with other names.

        From the state dict of a backbone with a neck, only the backbone is taken.
        """
        return {
            key.removeprefix("base."): value
            for key, value in state.items()
            if not key.startswith("neck.")
        }

    def checkpoint_activations(self) -> None:
        """Store only the inputs of residual blocks, and recompute the rest in the backward pass.

        A training step then needs less memory but more time. Outputs, gradients and the statistics
        of batch norm stay the same. See `torch.utils.checkpoint`.
        """
        for block in _blocks(self):
            block.forward = partial(_recomputed, block, block.forward)

    @abstractmethod
    def filter_chain(self) -> tuple[str, ...]:
        """Names of the 3x3 convolutions of conv5 along one path, from the output to the input.

        `deformnet.analysis.sampling_locations` takes all or the first few of them (Figure 6).
        """

    @property
    @abstractmethod
    def trunk_stages(self) -> Sequence[Sequence[str]]:
        """Names of the modules with parameters in each of conv1 to conv4."""

    def dilate(self, dilation: int) -> None:
        """Set the stride of conv5 to 1 and dilate its convolutions; see `dilate`.

        Args:
            dilation: Dilation at output stride 16. At 8, units are half as far apart, and the
                convolutions have twice the dilation.
        """
        dilate(self.conv5_stage, dilation, unit=16 // self._conv4_stride)

    def freeze(self, stages: int) -> None:
        """Freeze the first stages: 2 for conv1 and conv2, 4 for everything up to conv4."""
        for name in chain.from_iterable(self.trunk_stages[:stages]):
            self.get_submodule(name).requires_grad_(False)
        if stages > len(self.trunk_stages):
            self.conv5_stage.requires_grad_(False)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The residual blocks of a backbone: the composite modules in its sequences of modules.

    In HRNet, whose branches run in parallel, everything up to conv4 is one block.
    """
    for child in module.children():
        # Some stages of timm are sequences, but not `nn.Sequential`; they have this attribute.
        if isinstance(child, (nn.Sequential, Backbone)) or hasattr(child, "grad_checkpointing"):
            yield from _blocks(child)
        elif any(child.children()):
            yield child


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    if torch.compiler.is_compiling():  # compilers choose what to recompute
        return forward(*inputs)
    # Networks with dense connections append to the lists that their blocks take.
    inputs = tuple(list(it) if isinstance(it, list) else it for it in inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_passes, block))


def _passes(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the forward pass of a block and for its recomputation."""
    return nullcontext(), _KeepingBuffers(block)


class _KeepingBuffers(AbstractContextManager[None]):
    """Keeps recomputation from updating the running statistics of batch norm a second time.

    PyTorch enters it in every backward pass through a graph, and leaves it early with an exception.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __enter__(self) -> None:
        self._before = [(buffer, buffer.clone()) for buffer in self._block.buffers()]

    def __exit__(self, *_: object) -> None:
        for buffer, value in self._before:
            buffer.copy_(value)
        del self._before


def initialize(*layers: nn.Conv2d | nn.Linear) -> None:
    """Initialize weights randomly, with a standard deviation of 0.01, and biases to zero."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.get_parameter("bias"))


def require_images(images: Tensor) -> None:
    """Check the shape of images.

    Raises:
        ValueError: If `images` is not [N, 3, H, W].
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images to be [N, 3, H, W], but got {list(images.shape)}")


def entry_of(stage: Iterable[nn.Module]) -> list[nn.Module]:
    """The convolutions larger than 1x1 among modules, up to the last strided one."""
    large = [it for it in stage if isinstance(it, nn.Conv2d) and max(it.kernel_size) > 1]
    strided = [place for place, it in enumerate(large, 1) if max(it.stride) > 1]
    return list(large[: max(strided, default=0)])


def keep_resolution(stage: nn.Module) -> None:
    """Replace the stride of a stage by dilation 2: the same features, at more positions."""
    dilate(stage, 2, entry=entry_of(stage.modules()))


def dilate(
    stage: nn.Module, dilation: int, *, entry: Collection[nn.Module] = (), unit: int = 1
) -> None:
    """Set the stride of a stage to 1 and dilate its convolutions of odd size.

    Convolutions of even size, which merge patches in some networks, are not dilated.

    Args:
        entry: Convolutions that get half the dilation.
        unit: Factor of the dilation of all convolutions, including those of even size: how much
            finer than usual the input of the stage is.
    Raises:
        ValueError: If `dilation` is less than 1.
    """
    positive("dilation", dilation)
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if any(size % 2 == 0 for size in module.kernel_size):
                module.dilation = tuple(unit * step for step in module.dilation)
                module.padding = "same"
                continue
            factor = unit * (max(1, dilation // 2) if module in entry else dilation)
            module.dilation = tuple(factor * step for step in module.dilation)
            module.padding = tuple(
                step * (size // 2)
                for step, size in zip(module.dilation, module.kernel_size, strict=True)
            )


def deform_last(
    model: Backbone, layers: int, *, offset_groups: int, modulated: bool, offset_conv: OffsetConv
) -> None:
    """Convert the last `filters` of a backbone to deformable convolutions.

    Raises:
        UserError: If there are no filters, `layers` exceeds their number, or one cannot be
            converted.
    """
    filters = model.filters()
    if layers and not filters:
        raise UserError(
            f"{model.name}: expected {model.counted} for deform_layers={layers}, but it has none; "
            "use a neck (--neck residual), or set deform_layers to 0"
        )
    if not 0 <= layers <= len(filters):
        raise UserError(
            f"expected deform_layers to be 0 to {len(filters)}, the number of {model.counted} of "
            f"{model.name}, but got {layers}"
        )
    if layers:
        with users_values():
            deform_(
                model,
                *filters[-layers:],
                offset_groups=offset_groups,
                modulated=modulated,
                offset_conv=offset_conv,
            )
