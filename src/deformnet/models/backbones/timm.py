"""Convolutional networks of timm as dilated and deformable feature extractors."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.models.hrnet import HighResolutionNet
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from deformnet._errors import UserError
from deformnet.models.backbones.features import (
    Backbone,
    Norm,
    OutputStride,
    dilate,
    entry_of,
    require_images,
)


class TimmFeatures(Backbone):
    """A timm network without its classifier; see `backbone`.

    The modules up to stride 16 are in `trunk`, and the modules from there to stride 32 in `conv5`,
    with timm's names; at output stride 8, conv4 is in `trunk`, too. Pooling layers are not dilated,
    only convolutions. Images are padded on the right and at the bottom to a multiple of the stride,
    since networks with a patch stem would drop the remainder.

    If `center`, units are centered as in other backbones, since boxes and label maps are placed by
    them. In a network with TensorFlow's padding ("tf_..."), they would be 15 pixels away at output
    stride 16, so its strided convolutions are padded on both sides; with a patch stem, 7.5 pixels,
    so images are also padded on the left and at the top. Except at the borders, both translate the
    image.

    Args:
        name: timm's name of the network, with or without a weights tag.
        norm, output_stride, center, reduce_channels: See `backbone`.

    Raises:
        UserError: If timm has no such network, the network is not a sequence of convolutional
            stages, or its conv4 cannot keep the resolution of conv3 for output stride 8.
    """

    counted = "convolutions larger than 1x1"

    def __init__(
        self,
        name: str,
        norm: Norm,
        output_stride: OutputStride,
        center: bool,
        reduce_channels: int | None,
    ) -> None:
        net = _create(name)
        # The last feature map of each stride.
        levels = {level["reduction"]: level for level in cast(Any, net).feature_info}
        if not {16, 32} <= levels.keys():
            raise _unfit(name, f"only features of stride {', '.join(map(str, levels))}")
        super().__init__(
            levels[16]["num_chs"], levels[32]["num_chs"], output_stride, reduce_channels
        )
        self.name = f"timm/{name}"
        hub = cast(Any, net).pretrained_cfg
        if hub.get("hf_hub_id"):
            url = f"https://huggingface.co/{hub['hf_hub_id']}"
            self.published = {"timm": HubWeights(name, url)}
        # The input is always normalized with ImageNet's mean and standard deviation. The network's
        # own normalization, (pixel - mean) / std, is an affine function of it.
        given_mean, given_std, mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, hub["mean"], hub["std"])
        )
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", given_std / std, persistent=False)
        self.register_buffer("shift", (given_mean - mean) / std, persistent=False)

        theirs = {id(value): key for key, value in net.state_dict(keep_vars=True).items()}
        self._shapes = {key: value.shape for key, value in net.state_dict().items()}
        if isinstance(net, HighResolutionNet):
            if output_stride == 8:
                raise UserError(
                    f"timm/{name}: expected output_stride to be 16 or 32, since the branches of "
                    "HRNet run side by side, but got 8; use another network for stride 8"
                )
            self.trunk, self.conv5, self._stages = _split_high_resolution(net)
        else:
            self.trunk, self.conv5, self._stages = _split(net, name, levels)
        self._names = {
            theirs[id(value)]: key
            for key, value in self.state_dict(keep_vars=True).items()
            if id(value) in theirs
        }
        self._entry: list[str] = []
        if output_stride < 32:
            entry = _keep_resolution(self, ["conv5"])
            self._entry = [part for part, module in self.named_modules() if module in entry]
        self._lead = _center(self.trunk, self.conv5) if center else 0
        if output_stride == 8:
            entry = _keep_resolution(self, self._stages[3])
            for part in self._stages[3]:
                dilate(self.get_submodule(part), 2, entry=entry)
        if norm == "frozen":
            freeze_batch_norm_2d(self.trunk)
            freeze_batch_norm_2d(self.conv5)
        self._filters = self._run(name)
        self._add_reduction()

    def _run(self, name: str) -> list[str]:
        """Names of the convolutions larger than 1x1 in the order of the forward pass.

        Raises:
            UserError: If the features do not have the expected shape.
        """
        order: list[str] = []
        hooks = [
            module.register_forward_pre_hook(lambda *_, part=part: order.append(part))
            for part, module in self.named_modules()
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
        ]
        self.eval()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # PyTorch warns once that padding="same" copies the input of even kernels.
                warnings.simplefilter("ignore")
                conv4, conv5 = self.stages(torch.zeros(1, 3, 64, 96))
        except Exception as error:  # anything can fail in a network that is not sequential
            raise _unfit(name, str(error).partition("\n")[0]) from error
        for maps, channels, stride in (
            (conv4, self.conv4_channels, self._conv4_stride),
            (conv5, self.conv5_channels, self.stride),
        ):
            shape = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            expected = [1, channels, 64 // stride, 96 // stride]
            if shape != expected:
                raise _unfit(name, f"features of shape {shape} instead of {expected}")
        for hook in hooks:
            hook.remove()
        self.train()
        # A convolution that runs twice counts once, where it runs last.
        return list(reversed(dict.fromkeys(reversed(order))))

    def _normalized(self, images: Tensor) -> Tensor:
        require_images(images)
        height, width = (self._lead + side for side in images.shape[2:])
        right, bottom = -width % self.stride, -height % self.stride
        images = F.pad(images, (self._lead, right, self._lead, bottom))
        return images * self.scale + self.shift

    def _cropped(self, maps: Tensor, images: Tensor, stride: int) -> Tensor:
        """The units of the images, without those that are due to the padding on the left."""
        rows, columns = (-(-side // stride) for side in images.shape[2:])
        return maps[..., :rows, :columns] if self._lead else maps

    def _computed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.trunk(self._normalized(images))
        conv5 = self._cropped(self.conv5(maps), images, self.stride)
        return self._cropped(_first(maps), images, self._conv4_stride), conv5

    def conv4(self, images: Tensor) -> Tensor:
        maps = _first(self.trunk(self._normalized(images)))
        return self._cropped(maps, images, self._conv4_stride)

    @property
    def conv5_stage(self) -> nn.Module:
        return self.conv5

    def filters(self) -> list[str]:
        return self._filters

    def filter_chain(self) -> tuple[str, ...]:
        chain = tuple(name for name in reversed(self._filters) if name.startswith("conv5."))
        return chain if isinstance(self.conv5, nn.Sequential) else chain[:1]

    def dilate(self, dilation: int) -> None:
        entry = [self.get_submodule(name) for name in self._entry]
        dilate(self.conv5, dilation, entry=entry, unit=16 // self._conv4_stride)

    @property
    def trunk_stages(self) -> Sequence[Sequence[str]]:
        return self._stages

    def own_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of timm's network, with the names of this backbone.

        If the names differ, but the number, order and shapes of the tensors match timm's network,
        the state dict is from another implementation of that network, and is matched by order.
        """
        state = super().own_names(state)
        theirs, given = _without_counters(self._shapes), _without_counters(state)
        shapes = [value.shape for value in given.values()]
        if theirs.keys() != given.keys() and shapes == list(theirs.values()):
            state = dict(zip(theirs, given.values(), strict=True))
        return {
            self._names.get(key, key): value
            for key, value in state.items()
            if key in self._names or key not in self._shapes  # not the classifier
        }


class HubWeights:
    """Weights on timm's hub, analogous to torchvision's `WeightsEnum`.

    Args:
        name: timm's name of the network.
        url: URL of the weights.
    """

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url

    def get_state_dict(self, *, check_hash: bool) -> Mapping[str, Tensor]:
        """Downloads the weights, or loads them from the cache.

        Raises:
            OSError: If the download fails.
        """
        try:
            return timm.create_model(self.name, pretrained=True).state_dict()
        except Exception as error:  # depends on the client of the hub
            raise OSError(str(error).partition("\n")[0]) from error


class _HighResolutionTrunk(nn.Module):
    """HRNet up to stride 16 of its classifier, and its branch of stride 32.

    HRNet has four parallel branches of different resolution. Its classifier merges them from the
    finest to the coarsest, so the last merge is the only path from stride 16 to 32. The branches
    require image sizes that are multiples of 32 pixels.
    """

    def __init__(self, net: HighResolutionNet, widen: nn.ModuleList, down: nn.ModuleList) -> None:
        super().__init__()
        self.net, self.widen, self.down = net, widen, down

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2:]
        branches = self.net.forward_features(F.pad(x, (0, -width % 32, 0, -height % 32)))
        joined = self.widen[0](branches[0])
        for branch, widen, down in zip(branches[1:3], self.widen[1:], self.down, strict=True):
            joined = widen(branch) + down(joined)
        return joined[..., : height // 16, : width // 16], branches[3]


class _HighResolutionHead(nn.Module):
    """The last merge of HRNet's classifier, at the resolution that `down` keeps."""

    def __init__(self, widen: nn.Module, down: nn.Sequential) -> None:
        super().__init__()
        self.widen, self.down = widen, down

    def forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        joined, last = maps
        scale = 2 // cast(nn.Conv2d, self.down[0]).stride[0]
        last = F.interpolate(self.widen(last), scale_factor=scale)
        down = self.down(joined)
        return down + last[..., : down.shape[2], : down.shape[3]]


def interpolation_of(name: str) -> InterpolationMode:
    """How timm resizes images for a network."""
    with _known(name):
        config = timm.get_pretrained_cfg(name)
    return InterpolationMode.BILINEAR if config is None else InterpolationMode(config.interpolation)


def _create(name: str) -> nn.Module:
    with _known(name):
        return timm.create_model(name)


@contextmanager
def _known(name: str) -> Iterator[None]:
    """Raises UserError for a network, or a tag of its weights, that timm does not have."""
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"timm/{name}: expected a network of timm {timm.__version__}, but it has none of this "
            "name"
            + (f"; near misses: {', '.join(f'timm/{other}' for other in near)}" if near else "")
        )
    try:
        yield
    except RuntimeError as error:  # the tag of the weights is unknown
        raise UserError(f"timm/{name}: {error}") from error


def _split(
    net: nn.Module, name: str, levels: Mapping[int, Mapping[str, Any]]
) -> tuple[nn.Module, nn.Module, list[list[str]]]:
    """Modules up to stride 16, modules from there to 32, and `Backbone.trunk_stages`.

    Like timm's `FeatureListNet`, assumes that modules run in the order of their definition.
    """
    ends = {stride: level["module"] for stride, level in levels.items()}
    modules: dict[str, nn.Module] = {}
    for child, module in net.named_children():
        if any(end.startswith(f"{child}.") for end in ends.values()):
            modules |= {f"{child}.{inner}": part for inner, part in module.named_children()}
        else:
            modules[child] = module
    if not {ends[16], ends[32]} <= modules.keys():
        raise _unfit(name, f"features inside its module {ends[16].partition('.')[0]}")
    names = list(modules)
    conv4, conv5 = (names.index(ends[stride]) + 1 for stride in (16, 32))
    # A stem of stride 4 has no module of stride 2: all of it belongs to conv2.
    found = {stride: names.index(end) + 1 for stride, end in ends.items() if end in modules}
    bounds = [0, *(found.get(stride, 0) for stride in (2, 4, 8)), conv4]
    stages = [
        [f"trunk.{part.replace('.', '_')}" for part in names[max(bounds[:end]) : bounds[end]]]
        for end in range(1, len(bounds))
    ]
    trunk, last = nn.Sequential(), nn.Sequential()
    for position, (part, module) in enumerate(modules.items()):
        if position < conv5:
            (trunk if position < conv4 else last).add_module(part.replace(".", "_"), module)
    return trunk, last, stages


def _split_high_resolution(net: HighResolutionNet) -> tuple[nn.Module, nn.Module, list[list[str]]]:
    """Same as `_split`, for HRNet."""
    widen, down = cast(nn.ModuleList, net.incre_modules), cast(nn.ModuleList, net.downsamp_modules)
    net.incre_modules = net.downsamp_modules = net.final_layer = None  # features are the branches
    net.reset_classifier(0)
    trunk = _HighResolutionTrunk(net, widen[:3], down[:2])
    first = [["trunk.net.conv1", "trunk.net.bn1"]]
    first.append([f"trunk.net.{part}" for part in ("conv2", "bn2", "layer1")])
    rest = [f"trunk.net.{part}" for part, _ in net.named_children()]
    rest = [part for part in rest if part not in first[0] + first[1]]
    # Its branches of stride 8 and 16 run side by side.
    stages = [*first, [], [*rest, "trunk.widen", "trunk.down"]]
    return trunk, _HighResolutionHead(widen[3], cast(nn.Sequential, down[2])), stages


def _keep_resolution(model: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
    """Set all strides of parts of a model to 1.

    Returns:
        Their convolutions that `entry_of` finds before the change.
    """
    inside = {
        name: module
        for part in parts
        for name, module in model.get_submodule(part).named_modules(prefix=part)
    }
    entry = entry_of(inside.values())
    for name, module in inside.items():
        if type(module) is Conv2dSame:  # pads like any other convolution at stride 1
            module.__class__ = nn.Conv2d
        elif isinstance(module, nn.AvgPool2d):
            model.set_submodule(name, AvgPool2dSame(module.kernel_size, 1))
        elif isinstance(module, nn.MaxPool2d):
            model.set_submodule(name, MaxPool2dSame(module.kernel_size, 1))
    for part in parts:
        dilate(model.get_submodule(part), 1)
    return entry


def _center(*parts: nn.Module) -> int:
    """Pad the strided convolutions of consecutive parts on both sides.

    Returns:
        Pixels by which units are off center because of kernels of even size, which merge patches.
    """
    offset, stride = 0.0, 1
    for module in chain.from_iterable(part.modules() for part in parts):
        if not isinstance(module, nn.Conv2d) or module.kernel_size[0] == 1:
            continue
        if type(module) is Conv2dSame:
            module.__class__ = nn.Conv2d
            module.padding = tuple(side // 2 for side in module.kernel_size)
        size, step = module.kernel_size[0], module.stride[0]
        if step > 1 and size % 2 == 0:  # no network with such kernels has max pooling
            offset += (size - 1) / 2 * stride
        stride *= step
    return round(offset)


def _first(maps: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return maps[0] if isinstance(maps, tuple) else maps


def _without_counters(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without the batch norm counters, which older files lack."""
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _unfit(name: str, reason: str) -> UserError:
    return UserError(
        f"timm/{name}: expected a convolutional network, a sequence of stages with features of "
        f"stride 16 and 32, but got {reason}; choose another, such as timm/resnet50d, "
        "timm/regnety_016, timm/convnext_tiny or timm/tf_efficientnet_lite0"
    )
