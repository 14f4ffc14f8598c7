"""Mask R-CNN and Cascade Mask R-CNN on a student, made of torchvision's parts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from dreamteacher.downstream.detection.cascade import BoxPredictor, CascadeHeads
from dreamteacher.downstream.detection.config import DetectConfig
from dreamteacher.models.pyramid import SimplePyramid
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.settings import Precision
from dreamteacher.spec import FeatureSpec


class Pyramid(nn.Module):
    """A backbone and its FPN, with one more level that halves the coarsest one.

    A plain ViT's map goes through a simple pyramid first; `specs` are the levels that the FPN takes. The
    student is taken in and normalises images itself. The maps are float32, for box coordinates need their
    digits.

    Source: Lin et al., arXiv 1612.03144.
    """

    def __init__(
        self, student: Student, width: int, norm: Callable[[int], nn.Module] | None, precision: Precision
    ) -> None:
        super().__init__()
        self.student, self.out_channels, self.precision = student, width, precision
        self.simple = SimplePyramid(student.specs)
        self.specs = self.simple.specs
        channels = [s.channels for s in self.specs]
        self.fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool(), norm_layer=norm)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images N x 3 x H x W in [0, 1] -> maps by the names of the student's levels, and "pool"."""
        with autocast(images.device, self.precision):
            maps = self.simple(self.student(images))
            named = OrderedDict((s.name, m) for s, m in zip(self.specs, maps, strict=True))
            return {name: m.float().contiguous() for name, m in self.fpn(named).items()}


class Batcher(nn.Module):
    """Images of mixed sizes, side by side in one batch, in the place of torchvision's transform.

    It scales and normalises nothing: images come at their size, and a student normalises by itself. What is
    padded, up to a multiple of pixels, is the student's mean, which becomes 0 there, as padding is in
    torchvision.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple
        self.register_buffer("mean", mean.clone(), persistent=False)

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        """Images 3 x H x W and their targets -> a batch with their sizes, and the targets."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (-(-max(side) // self.multiple) * self.multiple for side in zip(*sizes, strict=True))
        batch = self.mean.expand(len(images), 3, height, width).clone()
        for whole, image in zip(batch, images, strict=True):
            whole[:, : image.shape[1], : image.shape[2]] = image
        return ImageList(batch, sizes), targets

    def postprocess(self, result: list[dict[str, Tensor]], *_: Any) -> list[dict[str, Tensor]]:
        """The detections as they are: `predict` brings them to the size of the file."""
        return result


def roi_pool(specs: Sequence[FeatureSpec], side: int) -> MultiScaleRoIAlign:
    """RoIAlign to side x side from the level that fits a box's size.

    torchvision infers the strides from the first batch, and wrongly so for small padded images: we state
    them.
    """
    pool = MultiScaleRoIAlign([s.name for s in specs], output_size=side, sampling_ratio=2)
    pool.scales = [1 / s.stride for s in specs]
    first, last = (s.stride.bit_length() - 1 for s in (specs[0], specs[-1]))
    pool.map_levels = initLevelMapper(first, last)
    return pool


def build_detector(
    student: Student, config: DetectConfig, *, classes: int, cascade: bool, precision: Precision = "auto"
) -> GeneralizedRCNN:
    """A detector, randomly initialised from torch's global generator but for the student, which is taken in.

    `classes` are counted without the background.

    Source: He et al., Mask R-CNN, arXiv 1703.06870, with the 4conv1fc box head of arXiv 1803.08494.
    """
    if config.backbone_norm == "sync":
        student.model = convert_sync_batchnorm(student.model)
    norm = {"batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm, "none": None}[config.head_norm]
    width = config.width
    pyramid = Pyramid(student, width, norm, precision)
    specs = pyramid.specs
    strides = [*(s.stride for s in specs), 2 * specs[-1].stride]
    anchors = AnchorGenerator(
        tuple((config.anchor * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
    )
    counts = {"training": config.proposals, "testing": config.proposals}
    rpn = RegionProposalNetwork(
        anchors, RPNHead(width, 3), 0.7, 0.3, config.anchors, 0.5, {k: 2 * n for k, n in counts.items()}, counts, 0.7
    )  # fmt: skip
    box_head = partial(FastRCNNConvFCHead, (width, 7, 7), [width] * 4, [config.fc], norm_layer=norm)
    mask_head = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm)
    masks = roi_pool(specs, 14), mask_head, MaskRCNNPredictor(width, width, classes + 1)
    heads: RoIHeads
    if cascade:
        make_predictor = partial(BoxPredictor, config.fc, classes + 1)
        heads = CascadeHeads(
            roi_pool(specs, 7), box_head, make_predictor, samples=config.rois,
            detections=config.detections, masks=masks,
        )  # fmt: skip
    else:
        predictor = FastRCNNPredictor(config.fc, classes + 1)
        heads = RoIHeads(
            roi_pool(specs, 7), box_head(), predictor, 0.5, 0.5, config.rois, 0.25, None, 0.05, 0.5,
            config.detections, *masks,
        )  # fmt: skip
    return GeneralizedRCNN(pyramid, rpn, heads, Batcher(student.mean, specs[-1].stride))
