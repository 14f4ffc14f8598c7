"""Settings of detection and panoptic segmentation: the small defaults, and those of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from dreamteacher.downstream.classification.config import check_numbers, check_training
from dreamteacher.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """How the detector is made and trained; the defaults are small. `PRESETS` has the paper's."""

    image_counts: tuple[int, ...] = ()
    """Labelled images to train on; each number is a result of its own; none: all that show an object."""
    steps: int = 200
    """Updates, the same for every number of images."""
    batch_size: int = 2
    """Images per update (at least 2); cut to the number of images."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""
    lr: float = 1e-3
    """Peak learning rate of everything but the backbone."""
    layer_decay: float = 0.9
    """Factor on the learning rate from one group of the backbone's layers to the one before it, (0, 1]."""
    weight_decay: float = 0.05
    """Of matrices and kernels."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises, [0, 1]."""
    milestones: tuple[float, ...] = ()
    """Shares of the steps after which the learning rate is cut; none: it falls along a cosine."""
    cut: float = 0.1
    """Factor of each cut, (0, 1]."""
    short_side: tuple[int, int] = (256, 256)
    """Least and greatest shorter side of a training image in pixels, drawn in steps of 32."""
    test_side: int = 256
    """Shorter side of a test image in pixels."""
    longest_side: int = 512
    """Longer sides are bound by this, in pixels."""
    flip: bool = True
    """Mirror an image left to right with probability one half; switch off where objects have a side."""
    backbone_norm: Literal["batch", "sync", "frozen"] = "batch"
    """BatchNorm of the backbone: trained, trained over all processes, or kept with its statistics."""
    head_norm: Literal["batch", "sync", "none"] = "batch"
    """Normalisation in the FPN and the heads."""
    width: int = 64
    """Channels of the FPN and of the heads' convolutions."""
    fc: int = 256
    """Channels of the box head's last layer."""
    anchor: float = 8.0
    """Side of the anchors of each level, in strides of the level."""
    anchors: int = 256
    """Anchors of an image that the region proposals are trained on."""
    proposals: int = 256
    """Region proposals of an image that the heads see."""
    rois: int = 64
    """Proposals of an image that the heads are trained on."""
    detections: int = 100
    """Most detections of an image; also the most that are scored."""
    workers: int = 2
    """Threads that decode training images; change speed only."""


# Mask R-CNN of a ResNet-50 on COCO for 12 epochs. Expected there (box / mask AP): supervised 38.9 / 35.4,
# SparK 41.6 / 37.7, DreamTeacher 44.1 / 40.1. Not run by us.
# Source: keyu-tian/SparK (MIT), downstream_d2/configs/coco_R_50_FPN_CONV_1x_moco_adam.yaml: optimizer, rates, layer
# decay, steps, cuts, sides, SyncBN and the 4conv1fc head are its; batch, width, anchors and rois Detectron2's defaults.
_COCO = DetectConfig(
    steps=90_000, batch_size=16, optimizer="adamw", lr=2.5e-4, layer_decay=0.6, weight_decay=1e-4,
    warmup=1000 / 90_000, milestones=(2 / 3, 8 / 9), cut=0.25, short_side=(480, 896), test_side=800,
    longest_side=1333, backbone_norm="sync", head_norm="sync", width=256, fc=1024, anchors=256,
    proposals=1000, rois=512, workers=16,
)  # fmt: skip
PRESETS: dict[str, DetectConfig] = {
    "coco-1x": _COCO,
    # 24 epochs: DreamTeacher 45.1 / 40.8.
    "coco-2x": replace(_COCO, steps=180_000, warmup=1000 / 180_000),
    # ConvNeXt-B, for detect-cascade: supervised 51.2 / 44.3, SparK 51.9 / 44.6, DreamTeacher 52.5 / 45.2. The paper
    # gives the 12 epochs only; rates, layer decay and sides are those of ConvNeXt's own 36 epochs. Source:
    # facebookresearch/ConvNeXt (MIT), object_detection/configs/convnext/cascade_mask_rcnn_convnext_base_..._3x_coco_in1k.py
    # (there also a GIoU loss, crops and a drop path of 0.7, which are not here).
    "coco-cascade-1x": replace(
        _COCO, lr=2e-4, layer_decay=0.8, weight_decay=0.05, warmup=500 / 90_000, milestones=(2 / 3, 11 / 12),
        cut=0.1, short_side=(480, 800),
    ),
    # 36 epochs of BDD100K's 7,000 images with instances: supervised 26.1 / 20.2, DreamTeacher 28.3 / 24.8.
    "bdd100k-36": replace(
        _COCO, steps=15_750, optimizer="sgd", lr=0.02, layer_decay=1.0, warmup=500 / 15_750,
        milestones=(2 / 3, 11 / 12), cut=0.1, short_side=(600, 720), test_side=720, longest_side=1280,
    ),
}  # fmt: skip


def check_detect(config: DetectConfig) -> None:
    """Raises UserError for settings that nothing can be trained with."""
    check_training(config)
    least, greatest = config.short_side
    if not 32 <= least <= greatest <= config.longest_side >= config.test_side >= 32:
        raise UserError(
            f"Sides of {least} to {greatest} (test {config.test_side}), at most {config.longest_side}.",
            "Give at least 32 pixels, in rising order.",
        )
    counts = config.image_counts
    if any(count < 2 for count in counts) or len(set(counts)) < len(counts):
        raise UserError(
            f"image_counts is {counts}.", "Give different numbers of at least 2, or none for all."
        )
    for name in ("layer_decay", "cut"):
        if not 0 < getattr(config, name) <= 1:
            raise UserError(f"{name} is {getattr(config, name)}.", "Give a number above 0 and up to 1.")
    if not 0 <= config.warmup <= 1 or any(not 0 < m < 1 for m in config.milestones):
        raise UserError(
            f"warmup {config.warmup}, milestones {config.milestones}.", "Give shares of the steps: 0 to 1."
        )
    numbers = ("width", "fc", "anchor", "anchors", "proposals", "rois", "detections")
    if low := [name for name in numbers if getattr(config, name) < 1]:
        raise UserError(f"{', '.join(low)} below 1.", "Give at least 1.")


@dataclass(frozen=True, kw_only=True)
class PanopticConfig:
    """How the Panoptic FPN is made, trained and merged."""

    detect: DetectConfig = field(default_factory=DetectConfig)
    """Its Mask R-CNN, and the training of all of it."""
    width: int = 128
    """Channels of the semantic branch, a multiple of 8."""
    instance_weight: float = 1.0
    """Of the losses of Mask R-CNN."""
    semantic_weight: float = 0.5
    """Of the cross-entropy of the semantic branch."""
    score: float = 0.5
    """Instances of a lower score are left out."""
    overlap: float = 0.5
    """An instance is left out when more than this share of it is taken by better ones."""
    stuff_area: int = 4096
    """A class of stuff is left out when it covers fewer pixels of the image."""

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise UserError(f"width is {self.width}.", "Give a multiple of 8.")
        check_numbers(self, least=("instance_weight", "semantic_weight", "stuff_area"))
        if not 0 <= self.score <= 1 or not 0 <= self.overlap <= 1:
            raise UserError(f"score {self.score}, overlap {self.overlap}.", "Give shares from 0 to 1.")


# BDD100K's 7,000 panoptic images for 36 epochs: ImageNet-supervised 22.4 PQ, DreamTeacher 21.8. Not run by us.
PANOPTIC_PRESETS = {"bdd100k-36": PanopticConfig(detect=PRESETS["bdd100k-36"])}
