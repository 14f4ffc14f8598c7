"""Panoptic segmentation: a Panoptic FPN, which is Mask R-CNN and a semantic branch on one feature pyramid.

Source: Kirillov et al., Panoptic Feature Pyramid Networks, arXiv 1901.02446.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from tqdm import tqdm

from dreamteacher.data.draws import check_draw, draw_images
from dreamteacher.data.images import BadImageError, Size
from dreamteacher.data.layouts.table import Part, check, layout_of, panoptic_files
from dreamteacher.data.loader import load_ahead
from dreamteacher.data.panoptic_set import PanopticSet, of_layout, read_panoptic
from dreamteacher.data.seeds import step_generator
from dreamteacher.data.split import Split, halved
from dreamteacher.downstream.detection.config import DetectConfig, check_detect
from dreamteacher.downstream.detection.data import Draw, Example, instances_of_ids, scaled_image, scaled_size
from dreamteacher.downstream.detection.model import build_detector
from dreamteacher.downstream.detection.train import (
    build_groups,
    calibrate,
    freeze_norms,
    make_optimizer,
    rate_at,
    training_draws,
)
from dreamteacher.downstream.features import device_of, frozen
from dreamteacher.downstream.loop import Saved, run_steps
from dreamteacher.downstream.panoptic.config import PanopticConfig
from dreamteacher.downstream.panoptic.merge import merge
from dreamteacher.downstream.segmentation.crops import scaled_mask
from dreamteacher.downstream.segmentation.few_masks import pixel_loss
from dreamteacher.downstream.segmentation.semantic import classes_at
from dreamteacher.downstream.task import Bench, Budgets, Group, Task
from dreamteacher.downstream.tasks import Metric
from dreamteacher.metrics import VOID, Segments, panoptic_counts, panoptic_quality
from dreamteacher.models.regressor import resize
from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.device import seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.optim import parameter_groups
from dreamteacher.runtime.settings import Precision
from dreamteacher.spec import FeatureSpec

if TYPE_CHECKING:
    from dreamteacher.downstream.config import EvaluateConfig

_IGNORED = 255
_NEEDS = "panoptic needs segments.", "Give --images, --masks and --segments."


def checked(data: Split[PanopticSet]) -> Split[PanopticSet]:
    """The same, if both parts have the same classes, of both kinds, and the pool shows a thing.

    Raises:
        UserError: they do not.
    """
    if (data.pool.names, data.pool.things) != (data.test.names, data.test.things):
        raise UserError(
            "The categories of the training and the test segments differ.",
            "Give both files the same ones.",
        )
    if len(set(data.pool.things)) < 2 or not data.pool.shown():
        raise UserError(
            "Panoptic segmentation needs classes of things and of stuff, and images that show things.",
            "Say so with isthing in the categories; without things, use the task semantic.",
        )
    return data


def load_panoptic(
    images: Path,
    masks: Path | None,
    segments: Path | None,
    test_images: Path | None = None,
    test_masks: Path | None = None,
    test_segments: Path | None = None,
    *,
    workers: int = 2,
) -> Split[PanopticSet]:
    """Both parts from their files; see `dreamteacher.data.panoptic_set.read_panoptic`.

    Args:
        images: folder of the training images; or LAYOUT:ROOT (coco, cityscapes, bdd100k), with both its parts.
        masks: folder of their PNGs.
        segments: the JSON file.
        test_images: none: they are in `images`.
        test_masks: none: they are in `masks`.
        test_segments: JSON file of the test; none: half of the images is set aside.
        workers: threads.

    Raises:
        UserError: for anything wrong with the files.
    """
    if layout_of(images) is not None:
        parts: tuple[Part, Part] = "train", "val"
        pool, test = (of_layout(panoptic_files(images, part), workers=workers) for part in parts)
        return checked(Split(pool=pool, test=test))
    if masks is None or segments is None:
        raise UserError(*_NEEDS)
    alone = test_segments is None
    pool = read_panoptic(segments, images, masks, whole=alone, workers=workers)
    if test_segments is not None:
        places = test_images or images, test_masks or masks
        test = read_panoptic(test_segments, *places, whole=True, workers=workers)
        return checked(Split(pool=pool, test=test))
    return checked(halved(pool))


# --- model ----------------------------------------------------------------------------------------------------


class SemanticBranch(nn.Module):
    """Each level of the pyramid enlarged step by step to the finest one, their sum, a per-pixel classifier.

    Args:
        strides: of the levels, fine to coarse, each twice the one before it.
        channels: of every level.
        classes: number of classes.
        width: channels inside.

    Source: sec. 3 of arXiv 1901.02446: a stage is 3x3 convolution, GroupNorm, ReLU, bilinear x2.
    """

    def __init__(self, strides: Sequence[int], channels: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for stride in strides:
            doublings = round(math.log2(stride / strides[0]))
            stages: list[nn.Module] = []
            for i in range(max(1, doublings)):
                stages += [
                    nn.Conv2d(width if i else channels, width, 3, padding=1, bias=False),
                    nn.GroupNorm(math.gcd(32, width), width),
                    nn.ReLU(),
                ]
                if doublings:
                    stages.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.levels.append(nn.Sequential(*stages))
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """One map per level, fine to coarse -> float32 logits N x classes x H x W of `size` = (H, W)."""
        finest = (maps[0].shape[-2], maps[0].shape[-1])
        parts = [resize(level(m), finest) for level, m in zip(self.levels, maps, strict=True)]
        return resize(self.classify(torch.stack(parts).sum(0)).float(), size)


class PanopticFPN(nn.Module):
    """Mask R-CNN and a semantic branch on its pyramid.

    The branch tells the classes of stuff apart, and one class more for everything that is a thing.

    Args:
        student: taken in, not copied.
        config: see `PanopticConfig`.
        things: whether a class has countable objects.
        precision: of the matrix products of the backbone and the FPN.
    """

    def __init__(
        self, student: Student, config: PanopticConfig, things: Sequence[bool], precision: Precision = "auto"
    ) -> None:
        super().__init__()
        self.things = [c for c, thing in enumerate(things) if thing]
        self.stuff = [c for c, thing in enumerate(things) if not thing]
        self.detector: GeneralizedRCNN = build_detector(
            student, config.detect, classes=len(self.things), cascade=False, precision=precision
        )
        self.specs: tuple[FeatureSpec, ...] = self.detector.backbone.specs
        strides = [spec.stride for spec in self.specs]
        self.branch = SemanticBranch(strides, config.detect.width, 1 + len(self.stuff), config.width)

    def losses(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Those of Mask R-CNN by torchvision's names, and "loss_semantic"; targets have a map "semantic"."""
        device = device_of(self)
        images = [e.image.to(device) for e in examples]
        targets = [{name: part.to(device) for name, part in e.target.items()} for e in examples]
        batch, _ = self.detector.transform(images, targets)
        maps = self.detector.backbone(batch.tensors)
        proposals, found = self.detector.rpn(batch, maps, targets)
        _, more = self.detector.roi_heads(maps, proposals, batch.image_sizes, targets)
        size = (batch.tensors.shape[-2], batch.tensors.shape[-1])
        logits = self.branch([maps[spec.name] for spec in self.specs], size)
        truth = torch.full((len(targets), *size), _IGNORED, device=device)
        for whole, target in zip(truth, targets, strict=True):
            part = target["semantic"]
            whole[: part.shape[0], : part.shape[1]] = part
        return {**found, **more, "loss_semantic": pixel_loss(logits, truth, _IGNORED)}

    def forward(self, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """float32 3 x H x W in [0, 1] -> torchvision's detections, and logits 1 x classes x H x W."""
        batch, _ = self.detector.transform([image])
        maps = self.detector.backbone(batch.tensors)
        proposals, _ = self.detector.rpn(batch, maps)
        (found,), _ = self.detector.roi_heads(maps, proposals, batch.image_sizes)
        size = (batch.tensors.shape[-2], batch.tensors.shape[-1])
        logits = self.branch([maps[spec.name] for spec in self.specs], size)
        return found, logits[..., : image.shape[-2], : image.shape[-1]]


# --- training -------------------------------------------------------------------------------------------------


def panoptic_example(data: PanopticSet, draw: Draw, longest: int) -> Example:
    """One image as it is trained on: boxes, labels and masks of its things, and the map "semantic" of its stuff.

    Args:
        data: the set.
        draw: which image, how large, whether mirrored.
        longest: bound on the longer side.

    Raises:
        BadImageError: a file cannot be read.
    """
    image, segments = data.read(draw.image)
    size = scaled_size((image.shape[1], image.shape[2]), draw.short, longest)
    ids = scaled_mask(segments.ids, size, 0, 0, size)
    scaled = scaled_image(image, size)
    if draw.mirror:
        scaled, ids = scaled.flip(2), ids.flip(1)
    semantic = torch.full(size, _IGNORED)
    things = torch.zeros_like(ids)
    stuff = [c for c, thing in enumerate(data.things) if not thing]
    for number, c in segments.classes.items():
        here = ids == number
        semantic[here] = 0 if data.things[c] else 1 + stuff.index(c)
        if data.things[c] and number not in segments.crowds:
            things[here] = number
    found = instances_of_ids(things)
    order = [c for c, thing in enumerate(data.things) if thing]
    numbers = things[things != VOID].unique().tolist()
    labels = torch.tensor([1 + order.index(segments.classes[n]) for n in numbers], dtype=torch.int64)
    masks = torch.stack([m.whole(size) for m in found.masks]) if numbers else torch.zeros(0, *size)
    target = {"boxes": found.boxes, "labels": labels, "masks": masks.to(torch.uint8), "semantic": semantic}
    return Example(scaled, target)


class _Examples(Dataset[list[Example]]):
    """Item (draws of a batch) is that batch; what cannot be read gives way to the next image."""

    def __init__(self, data: PanopticSet, longest: int) -> None:
        self.data, self.longest = data, longest

    def __getitem__(self, draws: list[Draw]) -> list[Example]:
        made = []
        for draw in draws:
            for i in range(len(self.data)):
                try:
                    other = draw._replace(image=(draw.image + i) % len(self.data))
                    made.append(panoptic_example(self.data, other, self.longest))
                    break
                except BadImageError:
                    continue
        return made if len(made) == len(draws) else []


def _batches(data: PanopticSet, draws: Sequence[list[Draw]], config: DetectConfig) -> Iterator[list[Example]]:
    for batch in load_ahead(_Examples(data, config.longest_side), draws, config.workers):
        if not batch:
            raise UserError(
                "None of the images with segments can be read.", "Check that the disk is still there."
            )
        yield batch


def train_panoptic(
    student: Student,
    data: PanopticSet,
    config: PanopticConfig,
    *,
    seed: int,
    precision: Precision = "auto",
    saved: Saved | None = None,
) -> PanopticFPN:
    """A Panoptic FPN in evaluation mode, trained as `dreamteacher.downstream.detection.train` trains Mask R-CNN.

    Args:
        student: left as it is; a fine-tuned copy of it is part of the result.
        data: images that show things (see `PanopticSet.shown`).
        config: see `PanopticConfig`.
        seed: of the heads, the batches, scales, mirroring, and of what torchvision draws.
        precision: of the matrix products of the backbone and the FPN.
        saved: where the training is kept; None: it is not.
    """
    device, detect = device_of(student), config.detect
    draws = training_draws(len(data), detect, step_generator(seed, 0, "panoptic"))
    with seeded(seed, device):
        backbone = copy.deepcopy(student)
        model = PanopticFPN(backbone, config, data.things, precision).to(device).train()
        if detect.backbone_norm == "frozen":
            freeze_norms(backbone)
        groups = build_groups(model.detector, detect)
        groups += [{**g, "factor": 1.0} for g in parameter_groups([model.branch], detect.weight_decay)]
        optimizer = make_optimizer(groups, detect)
        batches = _batches(data, draws[saved.step if saved else 0 :], detect)

        def losses_at(step: int) -> list[Tensor]:
            losses = model.losses(next(batches))
            stuff = losses.pop("loss_semantic")
            total = torch.stack(list(losses.values())).sum()
            return [config.instance_weight * total + config.semantic_weight * stuff]

        run_steps(
            [model], optimizer, losses_at, lambda step: rate_at(step, detect),
            steps=detect.steps, saved=saved, title="training",
        )  # fmt: skip

        def show(draws: Sequence[list[Draw]]) -> None:
            for batch in _batches(data, draws, detect):
                model.losses(batch)

        calibrate(model.detector, detect, len(data), show)
    return model.eval()


# --- test -----------------------------------------------------------------------------------------------------


def predict_segments(model: PanopticFPN, image: Tensor, config: PanopticConfig) -> Segments:
    """The segments of one image, at its own size.

    Args:
        model: left as it is.
        image: uint8 3 x H x W.
        config: its test and longest side, and the three thresholds of the merging.
    """
    size: Size = (image.shape[1], image.shape[2])
    scaled = scaled_size(size, config.detect.test_side, config.detect.longest_side)
    with frozen(model):
        found, logits = model(scaled_image(image, scaled).to(device_of(model)))
    keep = found["scores"] >= config.score
    boxes = found["boxes"][keep].cpu() * torch.tensor([size[1] / scaled[1], size[0] / scaled[0]]).repeat(2)
    small = found["masks"][keep].cpu()
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for i in range(len(boxes)):  # one by one: a hundred masks of a large picture would fill the memory
        masks[i] = paste_masks_in_image(small[i : i + 1], boxes[i : i + 1], size)[0, 0] >= 0.5
    table = torch.tensor([-1, *model.stuff])
    return merge(
        masks,
        torch.tensor(model.things)[found["labels"][keep].cpu() - 1],
        found["scores"][keep].cpu(),
        table[classes_at(logits, size)[0].cpu()],
        score=config.score,
        overlap=config.overlap,
        stuff_area=config.stuff_area,
    )


def panoptic(
    student: Student,
    data: Split[PanopticSet],
    config: PanopticConfig,
    *,
    images: int | None = None,
    seed: int = 0,
    precision: Precision = "auto",
    saved: Saved | None = None,
) -> Iterator[Metric]:
    """PQ, SQ and RQ of all classes, of things and of stuff, after fine-tuning a Panoptic FPN.

    Args:
        student: left as it is.
        data: images with segments; training images without a thing are left out.
        config: see `PanopticConfig`.
        images: images to train on, drawn by the seed; none: all.
        seed: of the draw and of the training.
        precision: of the matrix products of the backbone and the FPN.
        saved: where the training is kept; None: it is not.
    """
    shown = data.pool.take(torch.tensor(data.pool.shown()))
    drawn = draw_images(len(shown), images or len(shown), seed)
    model = train_panoptic(student, shown.take(drawn), config, seed=seed, precision=precision, saved=saved)
    counts = torch.zeros(len(data.test.names), 4, dtype=torch.float64)
    for i in tqdm(range(len(data.test)), desc="testing", disable=not sys.stderr.isatty()):
        try:
            image, truth = data.test.read(i)
        except BadImageError as error:
            raise UserError(
                f"'{error.path}' cannot be read any more: {error.reason}.",
                "Check that the disk is still there.",
            ) from None
        counts += panoptic_counts(predict_segments(model, image, config), truth, len(data.test.names))
    yield from panoptic_quality(counts, data.test.things).items()


def _given(config: EvaluateConfig) -> bool:
    return config.segments is not None


def _check_places(config: EvaluateConfig, _budgets: Budgets) -> None:
    if config.images is not None and layout_of(config.images) is not None:
        check(config.images, "panoptic")
    elif None in (config.images, config.masks, config.segments):
        raise UserError(*_NEEDS)


def _load(config: EvaluateConfig, budgets: Budgets) -> Split[PanopticSet]:
    assert config.images is not None
    train = config.images, config.masks, config.segments
    test = config.test_images, config.test_masks, config.test_segments
    data = load_panoptic(*train, *test, workers=config.workers)
    check_draw(len(data.pool.shown()), budgets)
    return data


def _check(config: EvaluateConfig) -> None:
    check_detect(config.panoptic.detect)


def _run(bench: Bench, images: int | None, seed: int) -> Iterator[Metric]:
    precision, saved = bench.config.precision, bench.saved
    return panoptic(
        bench.student, bench.data, bench.settings, images=images, seed=seed, precision=precision, saved=saved
    )


SEGMENTS = Group(
    name="panoptic",
    needs=_NEEDS,
    headline="pq",
    places=("images", "masks", "test_images", "test_masks", "segments", "test_segments"),
    given=_given,
    check=_check_places,
    load=_load,
)

TASK = Task(
    name="panoptic",
    what="panoptic segmentation",
    group=SEGMENTS,
    unit="images",
    config=PanopticConfig,
    budgets=lambda config: config.panoptic.detect.image_counts,
    long=True,
    check=_check,
    run=_run,
)
