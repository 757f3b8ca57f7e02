"""What all backbones have in common: the maps they make and how they become deformable.

Dai et al. 2017, section 2.3, "Deformable Convolution for Feature Extraction".
"""

from abc import abstractmethod
from typing import Literal, get_args

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from deformnet.nn import deform_

Norm = Literal["frozen", "trained"]
OutputStride = Literal[16, 32]


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's fixed batch norm, computed by PyTorch's own kernel.

    One pass over the map in place of two, and the output keeps the type of a half-precision input
    where torchvision's formula promotes it to float32.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class Backbone(nn.Module):
    """A classification network without its classifier. Abstract.

    Unit (i, j) of its maps is centred on pixel (stride * i, stride * j) of the image.

    A subclass makes its stages and then calls `_add_reduction`; one whose conv5 has another stride
    than `output_stride` sets `stride`.

    Args:
        conv4_channels: channels of conv4.
        conv5_channels: channels of conv5.
        output_stride: pixels of the image between units of conv5: 16 in dense prediction, where
            conv5 keeps the resolution of conv4, or 32 as in classification.
        reduce_channels: width of the randomly initialised 1x1 convolution and ReLU at the end;
            None leaves both out.
    Attributes:
        name: what the backbone is called, in recipes and messages.
        stride: pixels of the image between units of conv5.
        out_channels: channels that `forward` returns.
    """

    name: str

    def __init__(
        self,
        conv4_channels: int,
        conv5_channels: int,
        output_stride: OutputStride,
        reduce_channels: int | None,
    ) -> None:
        if output_stride not in get_args(OutputStride):
            raise ValueError(
                f"output_stride: wanted one of {get_args(OutputStride)}, got {output_stride}"
            )
        if reduce_channels is not None and reduce_channels < 1:
            raise ValueError(f"reduce_channels: wanted at least 1 or None, got {reduce_channels}")
        super().__init__()
        self.conv4_channels = conv4_channels
        self.conv5_channels = conv5_channels
        self.stride: int = output_stride
        self.out_channels = conv5_channels if reduce_channels is None else reduce_channels
        self._reduces = reduce_channels is not None

    def _add_reduction(self) -> None:
        """Makes the 1x1 convolution, after all stages.

        An optimiser knows parameters by their order, which the checkpoints of runs rely upon.
        """
        self.reduce: nn.Conv2d | None = None
        if self._reduces:
            self.reduce = nn.Conv2d(self.conv5_channels, self.out_channels, 1)
            nn.init.normal_(self.reduce.weight, std=0.01)
            nn.init.zeros_(self.reduce.get_parameter("bias"))

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, out_channels, ceil(H/stride), ceil(W/stride)]: conv5, reduced."""
        _, conv5 = self.stages(images)
        return self.reduced(conv5)

    def stages(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The maps of conv4 (at stride 16) and conv5 for images [N, 3, H, W].

        Raises:
            ValueError: if `images` has another number of dimensions or channels.
        """
        conv4 = self.conv4(images)
        return conv4, self.conv5(conv4)

    def reduced(self, conv5: Tensor) -> Tensor:
        """The map of conv5 as `forward` returns it, [N, out_channels, H, W]."""
        return conv5 if self.reduce is None else F.relu(self.reduce(conv5), inplace=True)

    @abstractmethod
    def conv4(self, images: Tensor) -> Tensor:
        """The map of conv4 alone, [N, conv4_channels, ceil(H/16), ceil(W/16)]; as `stages`."""

    @abstractmethod
    def conv5(self, conv4: Tensor) -> Tensor:
        """The map of conv5, [N, conv5_channels, H, W], from that of conv4."""

    @abstractmethod
    def filter_chain(self) -> tuple[str, ...]:
        """Names of the 3x3 convolutions of conv5 of which each reads the next, the top one first.

        Whose samples to follow in Figure 6: `deformnet.analysis.sampling_locations` takes them, or
        the first few.
        """

    @abstractmethod
    def freeze_first_stages(self) -> None:
        """Fixes the weights of conv1 and conv2, as the authors do in fine-tuning."""


def require_images(images: Tensor) -> None:
    """
    Raises:
        ValueError: if the tensor is not [N, 3, H, W].
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: wanted [N, 3, H, W], got {list(images.shape)}")


def norm_layer(norm: Norm) -> type[FrozenBatchNorm2d] | type[nn.BatchNorm2d]:
    """
    Raises:
        ValueError: for another word than "frozen" or "trained".
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm: wanted one of {get_args(Norm)}, got {norm!r}")
    return FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d


def dilate(stage: nn.Module, dilation: int) -> None:
    """Gives a stage stride 1, and dilates every filter larger than 1x1.

    Raises:
        ValueError: if the dilation is not positive.
    """
    if dilation < 1:
        raise ValueError(f"dilation: wanted at least 1, got {dilation}")
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


def deform_last(model: Backbone, layers: int, *, offset_groups: int, modulated: bool) -> None:
    """Makes the last 3x3 convolutions of a backbone deformable, counted from the end.

    Raises:
        ValueError: if there are not so many.
    """
    filters = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    if not 0 <= layers <= len(filters):
        raise ValueError(
            f"deform_layers: wanted 0 to {len(filters)}, the 3x3 convolutions of {model.name}, "
            f"got {layers}"
        )
    if layers:
        deform_(model, *filters[-layers:], offset_groups=offset_groups, modulated=modulated)
