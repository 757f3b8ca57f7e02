"""A small conv5 on top of a backbone that has none, or one of depthwise convolutions."""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from torch import Tensor, nn

from deformnet.models.backbones.aligned_inception_resnet import ConvNormReLU
from deformnet.models.backbones.features import Backbone, OutputStride
from deformnet.ops._arguments import positive

Neck = Literal["none", "residual"]


class ResidualConv(ConvNormReLU):
    """3x3 convolution and batch norm, added to their input, and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, nn.BatchNorm2d)

    def forward(self, input: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, channels, H, W]."""
        return self.relu(input + self.norm(self.conv(input)))


class BackboneWithNeck(Backbone):
    """A backbone and, on its last feature map, a 1x1 convolution and residual 3x3 convolutions.

    The neck takes the place of the paper's conv5: `deform_layers` and `dilation` apply to its 3x3
    convolutions. The backbone takes the place of conv1 to conv4: its last feature map is the output
    of `conv4`, on which region proposal networks run. Units stay where they are in the backbone.

    The batch norm of the neck is always trained, since its weights are random. A backbone whose
    parameters are all frozen stays in evaluation mode.

    Args:
        base: Backbone without channel reduction. Below output stride 32, its conv5 gets dilation 2;
            see `dilate`.
        output_stride: Output stride of `base`.
        channels: Channels of the neck.
        layers: Number of 3x3 convolutions.

    Raises:
        ValueError: If `channels` or `layers` is less than 1.
    """

    counted = "3x3 convolutions in the neck"

    def __init__(
        self, base: Backbone, output_stride: OutputStride, channels: int, layers: int
    ) -> None:
        positive("neck_channels", channels)
        positive("neck_layers", layers)
        super().__init__(base.out_channels, channels, output_stride, None)
        if output_stride < 32:
            base.dilate(2)
        self.name, self.published = base.name, base.published
        self.base = base
        self.neck = nn.Sequential(
            ConvNormReLU(base.out_channels, channels, 1, nn.BatchNorm2d),
            *(ResidualConv(channels) for _ in range(layers)),
        )
        self._add_reduction()

    def conv4(self, images: Tensor) -> Tensor:
        return self.base(images)

    def maps(self, images: Tensor) -> Tensor:
        """The last feature map of the backbone, [N, map_channels, H, W]."""
        return self.conv4(images)

    @property
    def map_channels(self) -> int:
        return self.conv4_channels

    def frozen_modules(self) -> nn.ModuleList:
        return self.base.frozen_modules()

    def _of_maps(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return maps, self.neck(maps)

    @property
    def conv5_stage(self) -> nn.Module:
        return self.neck

    def filters(self) -> list[str]:
        return list(reversed(self.filter_chain()))

    def filter_chain(self) -> tuple[str, ...]:
        return tuple(f"neck.{layer}.conv" for layer in reversed(range(1, len(self.neck))))

    @property
    def trunk_stages(self) -> Sequence[Sequence[str]]:
        return [[f"base.{name}" for name in stage] for stage in self.base.trunk_stages]

    def freeze(self, stages: int) -> None:
        """Freeze the first stages of the backbone: 5 for all of it. The neck is never frozen."""
        self.base.freeze(stages)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.base.eval()
        return self

    def own_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict with this network's names, from one of the backbone or of both.

        If it has no neck, the weights of the neck stay as they are.
        """
        parts = {f"base.{key}": value for key, value in self.base.own_names(state).items()}
        neck = {key: value for key, value in state.items() if key.startswith("neck.")}
        return parts | (neck or self.neck.state_dict(prefix="neck."))
