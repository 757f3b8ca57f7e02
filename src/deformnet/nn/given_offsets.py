"""Deformable convolution as a layer that takes offsets as an argument."""

from torch import Tensor, nn

from deformnet.ops import deform_conv2d
from deformnet.ops._arguments import IntOrPair, integer, pair

FOLLOWING = ("norm", "activation")
"""What follows the convolution in detectron2's layers, which contain it."""


class GivenOffsetsConv2d(nn.Conv2d):
    """Deformable convolution whose offsets and mask are arguments, as in torchvision.

    `deform_` converts such layers of other libraries to this class, and those in `deformnet.compat`
    are subclasses of it. Its arguments and state-dict keys are those of `nn.Conv2d`; the arguments
    of each call determine the number of offset groups and whether there is a mask.

    Shape:
        Input [N, C, H, W]; offset [N, 2*G*K, Ho, Wo], per tap (y, x) in pixels of the input; mask
        [N, G*K, Ho, Wo] or None; output [N, out_channels, Ho, Wo].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            integer("in_channels", in_channels),
            integer("out_channels", out_channels),
            pair("kernel_size", kernel_size),
            pair("stride", stride),
            pair("padding", padding),
            pair("dilation", dilation),
            integer("groups", groups),
            bool(bias),
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, offset: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        geometry = (
            pair("stride", self.stride),
            pair("padding", self.padding),
            pair("dilation", self.dilation),
        )
        output = deform_conv2d(input, offset, self.weight, self.bias, *geometry, mask)
        # detectron2's layers contain the norm and activation that follow the convolution.
        for name in FOLLOWING:
            following = getattr(self, name, None)
            output = output if following is None else following(output)
        return output
